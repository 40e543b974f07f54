"""Training and scoring of causal language models on prompts with answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from darex_jax.models.logits import of_logits
from darex_jax.tasks.answers import EncodedAnswers, answer_batches
from darex_jax.tasks.batching import Batch
from darex_jax.training.loop import Recipe, StepRecord, train

Params = Any  # nested dict of float arrays, as `load_params` returns it


def train_answers(
    model: Callable[..., Any],
    params: Params,
    examples: EncodedAnswers,
    recipe: Recipe,
    *,
    key: jax.Array,
    **loop: Any,
) -> tuple[Params, list[StepRecord]]:
    """Trains to continue prompts with their answers; the loss excludes the prompts.

    The same arguments give the same bits on the same platform.

    Args:
      model: `model(params, input_ids, attention_mask)` has `.logits` [B, T, V], as from `load_model`.
      params: its nested state dict, or with `frozen` the part to train; not modified.
      key: scalar key; it determines the order of the examples.
      loop: passed on to `darex_jax.training.loop.train`: frozen, pretrained, mesh, checkpoints, validate,
        measure, best, on_step.
    Returns, Raises: as `train`.
    """
    seed = int(jax.random.bits(key))
    return train(
        answer_loss,
        model,
        params,
        lambda epoch: answer_batches(examples, recipe.batch_size, seed, epoch),
        recipe,
        steps=recipe.total_steps(len(examples)),
        dropout_key=None,
        **loop,
    )


def answer_loss(
    model: Callable[..., Any], params: Params, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the answers' tokens, each given all tokens before it.

    Args: batch: from `answer_batches`; dropout_key: not used, decoders have no dropout.
    Returns: the sum over the batch in float32, and the number of tokens.
    """
    losses, counted, _ = _token_losses(model, params, batch)
    return jnp.sum(losses * counted), jnp.sum(counted)


def _token_losses(
    model: Callable[..., Any], params: Params, batch: Batch
) -> tuple[jax.Array, NDArray[Any], jax.Array]:
    """For each token but the first, [B, T - 1]: loss, 1 if it is in an answer, whether it is ranked first.

    A token with a non-finite loss does not count as ranked first: the argmax of NaN would be arbitrary.
    """

    def of(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return losses, (logits.argmax(-1) == target) & jnp.isfinite(losses)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    targets = jnp.roll(jnp.asarray(batch["input_ids"]), -1, axis=1)  # the last position has none
    losses, first = of_logits(of, model, params, inputs, targets)
    return losses[:, :-1], batch["loss_mask"][:, 1:], first[:, :-1]


class AnswerScores(NamedTuple):
    """Scores of the correct answers, each token given all tokens before it.

    Attributes:
      loss: mean cross-entropy of the answers' tokens.
      tokens: share of them that the model ranks first.
      answers: share of the answers whose tokens are all ranked first, i.e. that greedy decoding generates.
    """

    loss: float
    tokens: float
    answers: float

    def named(self) -> dict[str, float]:
        """By the names of a table's metrics."""
        return {"exact_match": self.answers, "token_accuracy": self.tokens, "loss": self.loss}


def answer_scores(model: Callable[..., Any], params: Params, batches: Sequence[Batch]) -> AnswerScores:
    """Args: batches: from `answer_batches`; padding rows do not count."""
    sums = [_answer_sums(model, params, batch) for batch in batches]
    loss, right, tokens, whole, answers = np.sum(np.asarray(sums, np.float64), axis=0)
    return AnswerScores(float(loss / tokens), float(right / tokens), float(whole / answers))


@partial(jax.jit, static_argnums=0)
def _answer_sums(model: Callable[..., Any], params: Params, batch: Batch) -> jax.Array:
    losses, counted, first = _token_losses(model, params, batch)
    right = first * counted
    tokens = jnp.sum(counted, axis=1)
    whole = (jnp.sum(right, axis=1) == tokens) & (tokens > 0)
    return jnp.stack(
        [jnp.sum(losses * counted), jnp.sum(right), jnp.sum(tokens), whole.sum(), (tokens > 0).sum()]
    )
