"""The training loop: AdamW on any loss of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from darex_jax.tasks.batching import Batch

Params = Any  # nested dict of float arrays, as `load_params` returns it
Model = Callable[..., Any]
Loss = Callable[[Model, Params, Batch, jax.Array | None], jax.Array]  # (model, params, batch, dropout key)


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


def total_steps(examples: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """How many steps a training takes of which `steps` or `epochs` is given, the other None.

    Raises: ValueError for neither or both, or nothing to train on.
    """
    if (steps is None) == (epochs is None):
        raise ValueError("give steps or epochs, one of the two.")
    if batch_size < 1 or not examples:
        raise ValueError(f"need batch_size >= 1 and examples, got {batch_size} and {examples} examples.")
    return steps if steps is not None else round((epochs or 0) * -(-examples // batch_size))


def train(
    loss: Loss,
    model: Model,
    params: Params,
    batches: Callable[[int], Iterable[Batch]],
    *,
    steps: int,
    dropout_key: jax.Array | None,
    learning_rate: float,
    warmup_ratio: float,
    weight_decay: float,
    clip_norm: float,
    on_step: Callable[[StepRecord], None] | None = None,
) -> tuple[Params, list[StepRecord]]:
    """Minimises a loss over all parameters; the same arguments give the same bits on the same platform.

    AdamW (no decay on vectors), linear warm-up then linear decay, gradients clipped at a global norm.

    Args:
      loss: a pure function to a scalar; with the model it decides which program is compiled, so pass the same
        function every time, no fresh lambda.
      params: left as they are (training works on a float32 copy).
      batches: the batches of an epoch, counted from 0, with as few different shapes as can be.
      dropout_key: scalar key; each step's key for the loss follows from it. None gives the loss None.
      on_step: called after every step, with the step's record.
    Returns: the float32 parameters and one record per step.
    Raises: ValueError for arguments out of range; FloatingPointError once a loss or gradient is not finite.
    """
    schedule = warmup_linear(learning_rate, steps, warmup_ratio)
    # A copy, because `_update` donates its arguments and the caller's tree has to survive.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    state = _optimizer(0.0, weight_decay, clip_norm).init(params)
    history: list[StepRecord] = []
    for step, batch in zip(range(steps), chain.from_iterable(map(batches, count())), strict=False):
        rate = float(schedule(step))
        step_key = None if dropout_key is None else jax.random.fold_in(dropout_key, step)
        arguments = (batch, step_key, rate, weight_decay, clip_norm)
        params, state, value, norm = _update(loss, model, params, state, *arguments)
        record = StepRecord(step, float(value), float(norm), rate)
        if not (math.isfinite(record.loss) and math.isfinite(record.gradient_norm)):
            raise FloatingPointError(
                f"training diverged at step {step} of {steps} (loss {record.loss}, gradient norm "
                f"{record.gradient_norm}); try a lower learning rate than {learning_rate:g}."
            )
        history.append(record)
        if on_step is not None:
            on_step(record)
    return params, history


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _update(
    loss: Loss,
    model: Model,
    params: Params,
    state: Any,
    batch: Batch,
    key: jax.Array | None,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float,
) -> tuple[Params, Any, jax.Array, jax.Array]:
    """One step: new params and state, the loss and the gradients' norm. Compiled once per model and shape."""
    value, grads = jax.value_and_grad(lambda params: loss(model, params, batch, key))(params)
    updates, state = _optimizer(learning_rate, weight_decay, clip_norm).update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, optax.tree.norm(grads)


def _optimizer(learning_rate: Any, weight_decay: Any, clip_norm: Any) -> optax.GradientTransformation:
    """AdamW behind a clip. The numbers may be traced, so that another recipe needs no other program."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=decay_mask),
    )
