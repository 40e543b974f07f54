"""Training of a causal language model to answer prompts, from pretrained weights or from nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from darex_jax.tasks.answers import EncodedAnswers, answer_batches
from darex_jax.tasks.batching import Batch
from darex_jax.training.loop import StepRecord, total_steps, train

Params = Any  # nested dict of float arrays, as `load_params` returns it


def train_answers(
    model: Callable[..., Any],
    params: Params,
    examples: EncodedAnswers,
    *,
    key: jax.Array,
    learning_rate: float,
    batch_size: int = 32,
    steps: int | None = None,
    epochs: float | None = None,
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    on_step: Callable[[StepRecord], None] | None = None,
) -> tuple[Params, list[StepRecord]]:
    """Trains every parameter to continue prompts with their answers; the prompts themselves are not learned.

    The same arguments give the same bits on the same platform. Optimiser and schedule are those of
    `darex_jax.training.loop.train`.

    Args:
      model: `model(params, input_ids, attention_mask)` has `.logits` [B, T, V], as of `load_model`.
      params: its nested state dict; left as it is (training works on a float32 copy).
      key: scalar key; the order of the examples follows from it.
      steps, epochs: how long; exactly one of the two.
      on_step: called after every step, with the step's record.
    Returns: the float32 parameters and one record per step.
    Raises: ValueError for arguments out of range; FloatingPointError once a loss or gradient is not finite.
    """
    total = total_steps(len(examples), batch_size, steps, epochs)
    seed = int(jax.random.bits(key))
    return train(
        answer_loss,
        model,
        params,
        lambda epoch: answer_batches(examples, batch_size, seed, epoch),
        steps=total,
        dropout_key=None,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        on_step=on_step,
    )


def answer_loss(
    model: Callable[..., Any], params: Params, batch: Batch, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of each answer's tokens, given all tokens before: the mean over the batch, in float32.

    Args: batch: from `answer_batches`; dropout_key: not used, decoders have no dropout.
    """
    logits = model(params, batch["input_ids"], batch["attention_mask"]).logits
    before, target = logits[:, :-1].astype(jnp.float32), batch["input_ids"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(before, target)
    counted = batch["loss_mask"][:, 1:]
    return jnp.sum(losses * counted) / jnp.sum(counted)
