"""Objectives that a search for q optimises: functions of the pruned model's parameters, compiled once.

Two of them use labels (`label_objective`, `answer_objective`), two only inputs. Batches come from
`evaluation_batches` or `answer_batches`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.evaluation.classification import predict
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.models import DecoderConfig, Model
from darex_jax.models.logits import of_logits
from darex_jax.q.search import trimmed_mean
from darex_jax.tasks import Task
from darex_jax.tasks.batching import Batch, model_inputs, real_parts, row_count
from darex_jax.training.causal_lm import answer_scores

Params = Any


class Objective(NamedTuple):
    """A score of pruned models, and its cost.

    Attributes:
      name: its name in tables.
      measure: params -> the score; NaN if an output is not finite.
      maximise: whether larger is better.
      over_masks: combines the scores of several masks into one.
      examples: number of examples per call of `measure`.
      labels: number of labels used.
      blind: why a constant output would get the best score, if it would; else None.
    """

    name: str
    measure: Callable[[Params], float]
    maximise: bool
    over_masks: Callable[[Sequence[float]], float]
    examples: int
    labels: int = 0
    blind: str | None = None


def label_objective(model: Model, task: Task, batches: Sequence[Batch]) -> Objective:
    """A classifier's metric on labelled examples: q_v."""
    labels = _in_order(batches)
    return Objective(
        f"validation {task.metric_name}",
        lambda params: _if_finite(task.metric, predict(model, params, batches), labels),
        True,
        _mean,
        len(labels),
        len(labels),
        _all_alike("the labels of the", labels),
    )


def answer_objective(model: Model, batches: Sequence[Batch], metric: str = "token_accuracy") -> Objective:
    """The share of tokens of the correct answers that a decoder ranks first: q_v.

    Args: metric: or "exact_match", of answers whose tokens are all ranked first.
    """
    rows = row_count(batches)

    def right(params: Params) -> float:
        scores = answer_scores(model, params, batches)
        return scores.named()[metric] if math.isfinite(scores.loss) else math.nan

    answers = [np.asarray(b["input_ids"])[np.asarray(b["loss_mask"]) > 0] for b in batches]
    blind = _all_alike("the answer tokens of the", np.concatenate(answers), rows)
    name = {"token_accuracy": "right answer tokens", "exact_match": "right answers"}[metric]
    return Objective(name, right, True, _mean, rows, rows, blind)


def prediction_objective(
    model: Model, fine: Params, batches: Sequence[Batch], metric: Callable[..., float] | None = None
) -> Objective:
    """Agreement with the fine-tuned model's own predictions, used as labels.

    Encoders: `metric` of the logits against the fine-tuned model's classes (with one output: its scores);
    None is the share of equal classes. Decoders: the share of tokens after which both rank the same token
    first.

    Raises: ValueError for a model without a head, or whose own outputs are not finite.
    """
    count = row_count(batches)
    if isinstance(model.config, DecoderConfig):
        references = reference_outputs(model, fine, batches)

        def same_tokens(params: Params) -> float:
            pairs = zip(batches, references, strict=True)
            sums = [_same_first(model, params, batch, reference[1]) for batch, reference in pairs]
            same, tokens, finite = np.sum(np.asarray(sums, np.float64), axis=0)
            return float(same / tokens) if finite == tokens else math.nan

        real = [np.asarray(real_parts(batch)[1]) > 0 for batch in batches]
        firsts = [np.asarray(r[1])[..., 0][mask] for r, mask in zip(references, real, strict=True)]
        if not all(np.isfinite(r[0])[mask].all() for r, mask in zip(references, real, strict=True)):
            raise _own_outputs_error()
        blind = _all_alike("the fine-tuned model's predictions for the", np.concatenate(firsts), count)
        return Objective("agreement of next tokens", same_tokens, True, _mean, count, blind=blind)
    logits = predict(model, fine, batches)
    if not np.isfinite(logits).all():
        raise _own_outputs_error()
    answers = logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(-1)
    if metric is None and logits.shape[-1] == 1:
        raise DarexError("a model with one output needs its task's metric to compare scores: pass `metric`.")
    compare = metric or (lambda moved, same_as: float(np.mean(moved.argmax(-1) == same_as)))
    return Objective(
        "agreement of predictions",
        lambda params: _if_finite(compare, predict(model, params, batches), answers),
        True,
        _mean,
        count,
        blind=_all_alike("the fine-tuned model's predictions for the", answers),
    )


def output_objective(model: Model, fine: Params, batches: Sequence[Batch]) -> Objective:
    """The output change of `darex_jax.evaluation.outputs`: q_e. Over masks, the mean without the outlier."""
    references = reference_outputs(model, fine, batches)
    return Objective(
        "output change",
        lambda params: output_change(model, params, batches, references),
        False,
        trimmed_mean,
        row_count(batches),
    )


def _if_finite(metric: Callable[..., float], logits: np.ndarray, labels: np.ndarray) -> float:
    return metric(logits, labels) if np.isfinite(logits).all() else math.nan


def _all_alike(what: str, values: np.ndarray, examples: int | None = None) -> str | None:
    """A description if all values are equal, in which case a constant output would be optimal."""
    if values.min() < values.max():
        return None
    return f"{what} {len(values) if examples is None else examples} examples are all the same"


def _own_outputs_error() -> DarexError:
    return DarexError("the fine-tuned model's own outputs are NaN or infinite for some of the examples.")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _in_order(batches: Sequence[Batch]) -> np.ndarray:
    """The labels of all rows but padding, in the order of `predict`'s logits."""
    real = [batch["weight"] > 0 for batch in batches]
    index = np.concatenate([b["index"][r] for b, r in zip(batches, real, strict=True)])
    labels = np.concatenate([b["labels"][r] for b, r in zip(batches, real, strict=True)])
    return labels[np.argsort(index)]


@partial(jax.jit, static_argnums=0)
def _same_first(model: Model, params: Params, batch: Batch, tokens: jax.Array) -> jax.Array:
    """The numbers of tokens after which `tokens[..., 0]` is ranked first, of all tokens, and of tokens with
    finite logits, all without padding."""

    def of(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return logits.argmax(-1) == tokens[..., 0], jnp.isfinite(logits).all(-1)

    same, finite = of_logits(of, model, params, model_inputs(batch), tokens)
    _, real = real_parts(batch)
    return jnp.stack([jnp.sum(same * real), jnp.sum(real), jnp.sum(finite * real)])
