"""Fine-tuning of sequence classifiers and regressors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpy.typing import NDArray

from darex_jax.core.errors import DarexError
from darex_jax.models import Model, classifier_from_pretrained
from darex_jax.tasks import Task
from darex_jax.tasks.batching import Batch, Encoded, training_batches
from darex_jax.training.loop import Recipe, StepRecord, train

Params = Any  # nested dict of float arrays, as `load_params` returns it


def classifier_for(task: Task, model: Model, params: Params, key: jax.Array) -> tuple[Model, dict[str, Any]]:
    """`classifier_from_pretrained` with a task's outputs, loss and class names."""
    problem = "regression" if task.kind == "regression" else "single_label_classification"
    return classifier_from_pretrained(model, params, task.num_labels, key, problem, task.label_names)


def example_losses(logits: jax.Array, labels: jax.Array | NDArray[Any]) -> jax.Array:
    """Loss per example [B]: cross-entropy for integer labels, squared error for float labels (one output)."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if logits.shape[-1] != 1:
        raise DarexError(
            f"float labels (scores) need a model with 1 output, this one has {logits.shape[-1]}."
        )
    return jnp.square(logits[..., 0] - labels)


def fine_tune(
    model: Callable[..., Any],
    params: Params,
    examples: Encoded,
    recipe: Recipe,
    *,
    key: jax.Array,
    **loop: Any,
) -> tuple[Params, list[StepRecord]]:
    """Fine-tunes on `examples`; the same arguments give the same bits on the same platform.

    Args:
      model: a classifier from `load_model` or `classifier_from_pretrained`.
      params: its nested state dict, or with `frozen` the part to train; not modified.
      examples: integer labels train with cross-entropy, float labels (one output) with squared error.
      key: scalar key; it determines the order of the examples and dropout.
      loop: passed on to `darex_jax.training.loop.train`: frozen, pretrained, mesh, checkpoints, validate,
        measure, best, on_step.
    Returns, Raises: as `train`.
    Source: the usual recipe for BERT, arXiv:1810.04805, appendix A.3.
    """
    steps = recipe.total_steps(len(examples))
    order_key, dropout_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    seed = int(jax.random.bits(order_key))
    return train(
        summed_loss,
        model,
        params,
        lambda epoch: training_batches(examples, recipe.batch_size, seed, epoch),
        recipe,
        steps=steps,
        dropout_key=dropout_key if recipe.dropout else None,
        **loop,
    )


def summed_loss(
    model: Callable[..., Any], params: Params, batch: Batch, dropout_key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The sum of `example_losses` over the batch's rows without padding rows, in float32, and their
    number."""
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    logits = model(params, *inputs, dropout_key=dropout_key).logits.astype(jnp.float32)
    return jnp.sum(example_losses(logits, batch["labels"]) * batch["weight"]), jnp.sum(batch["weight"])
