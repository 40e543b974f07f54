"""Fine-tuning of a sequence classifier (or regressor) with AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpy.typing import NDArray

from darex_jax.models import Model, classifier_from_pretrained
from darex_jax.tasks import Task
from darex_jax.tasks.batching import Batch, Encoded, training_batches
from darex_jax.training.loop import StepRecord, total_steps, train

Params = Any  # nested dict of float arrays, as `load_params` returns it


def classifier_for(task: Task, model: Model, params: Params, key: jax.Array) -> tuple[Model, dict[str, Any]]:
    """`classifier_from_pretrained` with the outputs and the loss that a task needs."""
    problem = "regression" if task.kind == "regression" else "single_label_classification"
    return classifier_from_pretrained(model, params, task.num_labels, key, problem)


def example_losses(logits: jax.Array, labels: jax.Array | NDArray) -> jax.Array:
    """Loss per example [B]: cross-entropy for integer labels, squared error for float labels (one output)."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if logits.shape[-1] != 1:
        raise ValueError(
            f"labels that are scores need a model with 1 output, this one has {logits.shape[-1]}."
        )
    return jnp.square(logits[..., 0] - labels)


def fine_tune(
    model: Callable[..., Any],
    params: Params,
    examples: Encoded,
    *,
    key: jax.Array,
    learning_rate: float,
    batch_size: int = 32,
    steps: int | None = None,
    epochs: float | None = None,
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    dropout: bool = True,
    on_step: Callable[[StepRecord], None] | None = None,
) -> tuple[Params, list[StepRecord]]:
    """Fine-tunes every parameter on `examples`; the same arguments give the same bits on the same platform.

    AdamW (no decay on vectors), linear warm-up then linear decay, gradients clipped at a global norm.

    Args:
      model: a classifier as `load_model` or `classifier_from_pretrained` returns it.
      params: its nested state dict; left as it is (training works on a float32 copy).
      examples: integer labels train with cross-entropy, float labels (one output) with squared error.
      key: scalar key; order of the examples and dropout follow from it.
      steps, epochs: how long; exactly one of the two.
      on_step: called after every step, with the step's record.
    Returns: the float32 parameters and one record per step.
    Raises: ValueError for arguments out of range; FloatingPointError once a loss or gradient is not finite.
    Source: the usual recipe for BERT, arXiv:1810.04805, appendix A.3.
    """
    total = total_steps(len(examples), batch_size, steps, epochs)
    order_key, dropout_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    seed = int(jax.random.bits(order_key))
    return train(
        _mean_loss,
        model,
        params,
        lambda epoch: training_batches(examples, batch_size, seed, epoch),
        steps=total,
        dropout_key=dropout_key if dropout else None,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        on_step=on_step,
    )


def _mean_loss(
    model: Callable[..., Any], params: Params, batch: Batch, dropout_key: jax.Array | None
) -> jax.Array:
    """Mean of `example_losses` over the batch's real rows."""
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    losses = example_losses(model(params, *inputs, dropout_key=dropout_key).logits, batch["labels"])
    return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])
