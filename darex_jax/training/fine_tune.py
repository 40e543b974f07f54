"""Fine-tuning of a sequence classifier (or regressor) with AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpy.typing import NDArray

from darex_jax.tasks.batching import Batch, Encoded, training_batches

Params = Any  # nested dict of float arrays, as `load_params` returns it


class StepRecord(NamedTuple):
    """One step, counted from 0; loss and gradient norm are those of the parameters it started from."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float


def warmup_linear(learning_rate: float, steps: int, warmup_ratio: float = 0.1) -> optax.Schedule:
    """Linear warm-up over the first `warmup_ratio` of `steps`, then linear decay to 0 after the last step.

    Returns: step -> learning rate; the peak is at step `int(warmup_ratio * steps)`, and no step has rate 0.
    """
    if steps < 1 or not 0.0 <= warmup_ratio < 1.0:
        raise ValueError(f"need steps >= 1 and warmup_ratio in [0, 1), got {steps} and {warmup_ratio}.")
    warmup = int(warmup_ratio * steps)

    def schedule(step: Any) -> Any:
        return learning_rate * jnp.minimum((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))

    return schedule


def decay_mask(params: Params) -> Params:
    """True for the leaves that decay: the matrices. Biases and LayerNorm parameters are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


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
    if (steps is None) == (epochs is None):
        raise ValueError("give steps or epochs, one of the two.")
    if batch_size < 1 or not len(examples):
        raise ValueError(f"need batch_size >= 1 and examples, got {batch_size} and {len(examples)} examples.")
    per_epoch = -(-len(examples) // batch_size)
    total = steps if steps is not None else round((epochs or 0) * per_epoch)
    schedule = warmup_linear(learning_rate, total, warmup_ratio)
    order_key, dropout_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    # A copy, because `_update` donates its arguments and the caller's tree has to survive.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    state = _optimizer(0.0, weight_decay, clip_norm).init(params)
    seed = int(jax.random.bits(order_key))
    history: list[StepRecord] = []
    for step, batch in zip(range(total), _forever(examples, batch_size, seed), strict=False):
        rate = float(schedule(step))
        step_key = jax.random.fold_in(dropout_key, step) if dropout else None
        arguments = (batch, step_key, rate, weight_decay, clip_norm)
        params, state, loss, norm = _update(model, params, state, *arguments)
        record = StepRecord(step, float(loss), float(norm), rate)
        if not (math.isfinite(record.loss) and math.isfinite(record.gradient_norm)):
            raise FloatingPointError(
                f"training diverged at step {step} of {total} (loss {record.loss}, gradient norm "
                f"{record.gradient_norm}); try a lower learning rate than {learning_rate:g}."
            )
        history.append(record)
        if on_step is not None:
            on_step(record)
    return params, history


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _update(
    model: Callable[..., Any],
    params: Params,
    state: Any,
    batch: Batch,
    key: jax.Array | None,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float,
) -> tuple[Params, Any, jax.Array, jax.Array]:
    """One step: new params and state, the loss and the gradients' norm. Compiled once per model and shape."""

    def loss_fn(params: Params) -> jax.Array:
        inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        losses = example_losses(model(params, *inputs, dropout_key=key).logits, batch["labels"])
        return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = _optimizer(learning_rate, weight_decay, clip_norm).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)


def _optimizer(learning_rate: Any, weight_decay: Any, clip_norm: Any) -> optax.GradientTransformation:
    """AdamW behind a clip. The numbers may be traced, so that another recipe needs no other program."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=decay_mask),
    )


def _forever(examples: Encoded, batch_size: int, seed: int) -> Iterator[Batch]:
    for epoch in count():
        yield from training_batches(examples, batch_size, seed, epoch)
