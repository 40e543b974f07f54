"""What a search for q makes better: a function of the pruned model's parameters, each compiled once.

Two of them look at labels (`label_objective`, `answer_objective`), two at inputs alone. Batches come from
`evaluation_batches` or `answer_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.evaluation.classification import predict
from darex_jax.evaluation.outputs import output_change, real_parts, reference_outputs
from darex_jax.models import DecoderConfig, Model
from darex_jax.q.search import trimmed_mean
from darex_jax.tasks import Task
from darex_jax.tasks.batching import Batch, model_inputs, row_count
from darex_jax.training.causal_lm import answer_scores

Params = Any


class Objective(NamedTuple):
    """A number that says how good a pruned model is, and what it costs.

    Attributes:
      name: what a table calls it.
      measure: params -> the number.
      maximise: whether larger is better.
      over_masks: makes one number of those of several masks.
      examples: how many go through the model for one `measure`.
      labels: how many of their labels are looked at.
    """

    name: str
    measure: Callable[[Params], float]
    maximise: bool
    over_masks: Callable[[Sequence[float]], float]
    examples: int
    labels: int = 0


def label_objective(model: Model, task: Task, batches: Sequence[Batch]) -> Objective:
    """A classifier's metric on labelled examples: q_v."""
    labels = _in_order(batches)
    return Objective(
        f"validation {task.metric_name}",
        lambda params: task.metric(predict(model, params, batches), labels),
        True,
        _mean,
        len(labels),
        len(labels),
    )


def answer_objective(model: Model, batches: Sequence[Batch]) -> Objective:
    """A decoder's share of right tokens in known answers: q_v."""
    rows = row_count(batches)
    return Objective(
        "right answer tokens",
        lambda params: answer_scores(model, params, batches).tokens,
        True,
        _mean,
        rows,
        rows,
    )


def prediction_objective(
    model: Model, fine: Params, batches: Sequence[Batch], metric: Callable[..., float] | None = None
) -> Objective:
    """Agreement with the fine-tuned model's own predictions, which stand in for labels.

    Encoders: `metric` of the logits against the classes (one output: the scores) that the fine-tuned model
    gives; None is the share of equal classes. Decoders: the share of real tokens after which both rank
    the same token first.

    Raises: ValueError for a model without a head.
    """
    count = row_count(batches)
    if isinstance(model.config, DecoderConfig):
        references = reference_outputs(model, fine, batches)

        def same_tokens(params: Params) -> float:
            pairs = zip(batches, references, strict=True)
            sums = [_same_first(model, params, batch, reference[1]) for batch, reference in pairs]
            same, tokens = np.sum(np.asarray(sums, np.float64), axis=0)
            return float(same / tokens)

        return Objective("agreement of next tokens", same_tokens, True, _mean, count)
    logits = predict(model, fine, batches)
    answers = logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(-1)
    if metric is None and logits.shape[-1] == 1:
        raise DarexError("a model with one output needs its task's metric to compare scores.")
    compare = metric or (lambda moved, same_as: float(np.mean(moved.argmax(-1) == same_as)))
    return Objective(
        "agreement of predictions",
        lambda params: compare(predict(model, params, batches), answers),
        True,
        _mean,
        count,
    )


def output_objective(model: Model, fine: Params, batches: Sequence[Batch]) -> Objective:
    """The output change of `darex_jax.evaluation.outputs`: q_e. Over masks, the mean without the farthest."""
    references = reference_outputs(model, fine, batches)
    return Objective(
        "output change",
        lambda params: output_change(model, params, batches, references),
        False,
        trimmed_mean,
        row_count(batches),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _in_order(batches: Sequence[Batch]) -> np.ndarray:
    """The labels of every real row, in the order in which `predict` returns logits."""
    real = [batch["weight"] > 0 for batch in batches]
    index = np.concatenate([b["index"][r] for b, r in zip(batches, real, strict=True)])
    labels = np.concatenate([b["labels"][r] for b, r in zip(batches, real, strict=True)])
    return labels[np.argsort(index)]


@partial(jax.jit, static_argnums=0)
def _same_first(model: Model, params: Params, batch: Batch, tokens: jax.Array) -> jax.Array:
    """The number of real tokens after which `tokens[..., 0]` is ranked first, and of real tokens."""
    first = model(params, **model_inputs(batch)).logits.argmax(-1)
    _, real = real_parts(batch)
    return jnp.stack([jnp.sum((first == tokens[..., 0]) * real), jnp.sum(real)])
