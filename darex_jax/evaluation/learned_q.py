"""Learned per-layer q: gradient descent on the output change, in one coefficient a layer and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from darex_jax.core.delta import apply_delta, rescale
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names
from darex_jax.evaluation.outputs import Reference, output_change, output_change_sums, reference_outputs
from darex_jax.models import Model
from darex_jax.q.per_layer import bias_of
from darex_jax.tasks.batching import Batch
from darex_jax.training.checkpoints import Checkpoints

Params = Any
LEARNING_RATE = 1e-2
PATIENCE = 5  # epochs without a better held-out change


class LearnedQ(NamedTuple):
    """What training found.

    Attributes:
      q: one for every name of the masked delta, of the epoch with the least held-out change.
      change: that held-out change.
      history: epoch by epoch, the mean change in training and the held-out change after it. The first entry
        is the start, its training change the held-out one.
    """

    q: dict[str, float]
    change: float
    history: list[tuple[float, float]]


def learn_q(
    model: Model,
    fine: Params,
    start: Params,
    masked: Params,
    drop_rate: float,
    layers: Sequence[str],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    epochs: int = 20,
    learning_rate: float = LEARNING_RATE,
    patience: int = PATIENCE,
    checkpoints: Checkpoints | None = None,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, change, held_out: None,
) -> LearnedQ:
    """Trains q_l = (1 - p) + |coefficient_l| of every linear layer, from DARE's q on.

    AdamW with a cosine schedule; the loss is the output change (`darex_jax.evaluation.outputs`): of an
    encoder's hidden states, or of a decoder's logits at the fine-tuned model's five likeliest tokens. It ends
    after `patience` epochs without a better held-out change. Nothing in it is random; with `checkpoints` a
    training that was stopped goes on, to the same bits.

    Args:
      start: from `split_in_scope`.
      masked: its delta with the dropped entries at zero, not rescaled: `prune(key, delta, drop_rate, 1.0)`.
      layers: the weights that have a coefficient each; their biases follow them, all else has the mean q.
      batches, held_out: what is trained on, a step a batch, and what decides when to stop.
      learning_rate: AdamW's at the start, which is by how much the first step changes every q: the authors'
        1e-2 brings it to eleven times DARE's at 0.999.
      on_epoch: called after every epoch with its number from 1, the mean change and the held-out change.
    Raises: ValueError for no layer or no batch, or if the outputs are not finite at DARE's q, where learning
      begins; FloatingPointError once the change is not finite.
    Source: the authors' code for DAREx, arXiv:2410.09344.
    """
    if not layers or not batches or not held_out:
        raise DarexError("learning q takes at least one layer, one batch and one held-out batch.")
    names = tuple(flatten_names(masked))
    number = {part: i for i, layer in enumerate(layers) for part in (layer, bias_of(layer))}
    layout = tuple(number.get(name, -1) for name in names)  # -1: the mean of all
    density = round(1.0 - drop_rate, 12)
    steps = epochs * len(batches)
    references, held_out_references = (reference_outputs(model, fine, b) for b in (batches, held_out))

    def change(coefficients: jax.Array) -> float:
        q = dict(zip(names, _q_by_name(layout, density, coefficients), strict=True))
        return output_change(model, _rescaled(start, masked, q), held_out, held_out_references)

    coefficients = jnp.zeros(len(layers), jnp.float32)
    history = np.full((epochs + 1, 2), np.nan)
    history[0] = change(coefficients)
    if not np.isfinite(history[0, 0]):
        raise DarexError("outputs are not finite at DARE's q, where learning begins: choose a searched one.")
    state = (jnp.int32(0), coefficients, _optimizer(0.0).init(coefficients), coefficients, history)
    if checkpoints is not None and (found := checkpoints.restore(state)) is not None:
        state = found[1]
    epoch, coefficients, moments, best, history = state
    done = int(epoch)
    while done < epochs and done - int(np.nanargmin(history[:, 1])) < patience:
        changes = []
        for i, pair in enumerate(zip(batches, references, strict=True)):
            rate = _cosine(learning_rate, done * len(batches) + i, steps)
            coefficients, moments, seen = _step(
                model, layout, density, rate, coefficients, moments, start, masked, *pair
            )
            changes.append(seen)
        done += 1
        mean, after = float(np.mean(np.asarray(changes, np.float64))), change(coefficients)
        if not np.isfinite(mean + after):
            raise FloatingPointError(f"learning q diverged in epoch {done}: the output change is {after}.")
        best = coefficients if after < np.nanmin(history[:, 1]) else best
        history[done] = mean, after
        on_epoch(done, mean, after)
        if checkpoints is not None:
            checkpoints.save(done, (jnp.int32(done), coefficients, moments, best, history), -after)
    by_name = {name: float(x) for name, x in zip(names, _q_by_name(layout, density, best), strict=True)}
    seen = [(float(a), float(b)) for a, b in history[: done + 1]]
    return LearnedQ(by_name, min(b for _, b in seen), seen)


@jax.jit
def _rescaled(start: Params, masked: Params, q: dict[str, jax.Array]) -> Params:
    return apply_delta(start, rescale(masked, q))


def _cosine(learning_rate: float, step: int, steps: int) -> float:
    """optax's `cosine_decay_schedule` on the host: a device would do it behind the steps that are queued."""
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _optimizer(learning_rate: Any) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=0.01)


def _q_by_name(layout: tuple[int, ...], density: float, coefficients: jax.Array) -> list[jax.Array]:
    # Not `jnp.abs`, whose gradient at 0, where all begin, is 0.
    q = density + jnp.where(coefficients < 0, -coefficients, coefficients)
    return [q[i] if i >= 0 else jnp.mean(q) for i in layout]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    model: Model,
    layout: tuple[int, ...],
    density: float,
    learning_rate: jax.Array,
    coefficients: jax.Array,
    moments: Any,
    start: Params,
    masked: Params,
    batch: Batch,
    reference: Reference,
) -> tuple[jax.Array, Any, jax.Array]:
    """One step: new coefficients and moments, and the change before it."""

    def loss(coefficients: jax.Array) -> jax.Array:
        q = dict(zip(flatten_names(masked), _q_by_name(layout, density, coefficients), strict=True))
        total, count = output_change_sums(model, False, _rescaled(start, masked, q), batch, reference)
        return total / count

    value, gradient = jax.value_and_grad(loss)(coefficients)
    steps, moments = _optimizer(learning_rate).update(gradient, moments, coefficients)
    return optax.apply_updates(coefficients, steps), moments, value
