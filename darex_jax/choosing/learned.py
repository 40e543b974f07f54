"""Learns q by gradient descent on the output change, with one coefficient per layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from darex_jax.choosing.choice import LEARNING_RATE, Choice, OnValue, uninformative
from darex_jax.choosing.pair import Pair, Params
from darex_jax.choosing.table import CALIBRATION_SIZE
from darex_jax.core.delta import apply_delta, prune, rescale
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import flatten_names, seed_key
from darex_jax.evaluation.calibration import input_statistics
from darex_jax.evaluation.outputs import Reference, output_change, output_change_sums, reference_outputs
from darex_jax.models import Model
from darex_jax.q.per_layer import bias_of
from darex_jax.tasks.batching import Batch
from darex_jax.tasks.source import Material, hold_out
from darex_jax.training.checkpoints import Checkpoints, own_place


def by_gradient(
    pair: Pair, material: Material, choice: Choice, inputs: Mapping[str, str], on_value: OnValue
) -> dict[str, Any]:
    """Minimises the output change; the epoch with the least change on held-out examples is used.

    Uses the pair's single mask and overwrites its delta: the pair must not be used afterwards.
    """
    (seed,) = pair.seeds
    order, quarter = hold_out_quarter(len(material.encoded), seed)
    rest, held_out = (material.select(rows).batches(CALIBRATION_SIZE) for rows in (order, quarter))
    masked = prune(seed_key(seed), pair.delta, pair.drop_rate, 1.0, donate=True)
    known = input_statistics(pair.model, pair.params, rest[:1])
    layers = [name for name in flatten_names(masked) if name in known]
    made_from = {
        "model": inputs["fine_weights"], "data": inputs["data"], "base": inputs["base_weights"],
        "mask": f"{pair.drop_rate} {list(pair.seeds)}", "rate": str(choice.learning_rate),
        "scope": json.dumps([choice.include, choice.exclude]),
    }  # fmt: skip
    with own_place(choice.checkpoints, made_from, "search") as place:
        how = Learning(
            learning_rate=choice.learning_rate,
            checkpoints=None if place is None else Checkpoints(place, every=1),
            on_epoch=lambda epoch, _, change: on_value(epoch, change),
        )
        learned = learn_q(pair, masked, layers, rest, held_out, how)
    epochs = len(learned.history) - 1
    # The held-out examples once at the start; per epoch the others forwards and backwards (which counts as
    # two more), and the held-out ones once.
    passes = len(quarter) + epochs * (3 * len(order) + len(quarter))
    found = {
        "q": learned.q, "value": learned.change, "value_name": "held-out output change",
        "curve": [[epoch, change] for epoch, (_, change) in enumerate(learned.history)],
        "evaluations": round(passes / len(material.encoded), 2), "examples": len(material.encoded),
    }  # fmt: skip
    if learned.change == learned.history[0][1]:
        found["warning"] = uninformative("no epoch was better than the first q")
    return found


def hold_out_quarter(count: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Row indices for training, and a held-out quarter (at least one) for early stopping; both ascending."""
    return hold_out(count, max(1, count // 4), seed)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Hyperparameters of `learn_q`.

    Attributes:
      learning_rate: AdamW's initial rate, by which the first step changes every q: the authors' 1e-2 makes it
        eleven times DARE's at 0.999.
      patience: epochs without improvement of the held-out change.
      on_epoch: called after every epoch (from 1) with its number, the mean change and the held-out change.
    """

    epochs: int = 20
    learning_rate: float = LEARNING_RATE
    patience: int = 5
    checkpoints: Checkpoints | None = None
    on_epoch: Callable[[int, float, float], None] = lambda epoch, change, held_out: None


class LearnedQ(NamedTuple):
    """The result of training.

    Attributes:
      q: one per name of the masked delta, from the epoch with the least held-out change.
      change: that held-out change.
      history: per epoch, the mean change in training and the held-out change after it. The first entry is the
        initial state, with the held-out change for both.
    """

    q: dict[str, float]
    change: float
    history: list[tuple[float, float]]


def learn_q(
    pair: Pair,
    masked: Params,
    layers: Sequence[str],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    how: Learning,
) -> LearnedQ:
    """Trains q_l = (1 - p) + |coefficient_l| of every linear layer, starting at DARE's q.

    AdamW with a cosine schedule; the loss is the output change (`darex_jax.evaluation.outputs`): of an
    encoder's hidden states, or of a decoder's logits at the fine-tuned model's five likeliest tokens. It
    stops after `patience` epochs without improvement of the held-out change. It is deterministic; with
    `checkpoints` it resumes bit for bit.

    Args:
      pair: its delta and seeds are not used.
      masked: its delta with the dropped entries at zero, not rescaled: `prune(key, delta, drop_rate, 1.0)`.
      layers: weights with one coefficient each, shared with their biases; all others have the mean q.
      batches, held_out: for training, one step per batch, and for early stopping.
    Raises: ValueError for no layer or no batch, or if the outputs are not finite at DARE's q, the initial
      one; FloatingPointError once the change is not finite.
    Source: the authors' code for DAREx, arXiv:2410.09344.
    """
    if not layers or not batches or not held_out:
        raise DarexError("learning q needs at least one layer, one batch and one held-out batch.")
    names = tuple(flatten_names(masked))
    number = {part: i for i, layer in enumerate(layers) for part in (layer, bias_of(layer))}
    layout = tuple(number.get(name, -1) for name in names)
    fixed = _Fixed(pair.model, layout, pair.density)
    epochs, checkpoints = how.epochs, how.checkpoints
    references, held_out_references = (
        reference_outputs(pair.model, pair.params, some) for some in (batches, held_out)
    )

    def change(coefficients: jax.Array) -> float:
        q = dict(zip(names, _q_by_name(fixed, coefficients), strict=True))
        return output_change(pair.model, _rescaled(pair.start, masked, q), held_out, held_out_references)

    coefficients = jnp.zeros(len(layers), jnp.float32)
    history = np.full((epochs + 1, 2), np.nan)
    history[0] = change(coefficients)
    if not np.isfinite(history[0, 0]):
        raise DarexError("outputs are not finite at DARE's q, the initial one: choose a searching objective.")
    state = (jnp.int32(0), coefficients, _optimizer(0.0).init(coefficients), coefficients, history)
    if checkpoints is not None and (found := checkpoints.restore(state)) is not None:
        state = found[1]
    epoch, coefficients, moments, best, history = state
    done = int(epoch)
    while done < epochs and done - int(np.nanargmin(history[:, 1])) < how.patience:
        changes = []
        for i, example in enumerate(zip(batches, references, strict=True)):
            rate = _cosine(how.learning_rate, done * len(batches) + i, epochs * len(batches))
            (coefficients, moments), before = _step(
                fixed, rate, (coefficients, moments), pair.start, masked, example
            )
            changes.append(before)
        done += 1
        mean, after = float(np.mean(np.asarray(changes, np.float64))), change(coefficients)
        if not np.isfinite(mean + after):
            raise FloatingPointError(f"learning q diverged in epoch {done}: the output change is {after}.")
        best = coefficients if after < np.nanmin(history[:, 1]) else best
        history[done] = mean, after
        how.on_epoch(done, mean, after)
        if checkpoints is not None:
            checkpoints.save(done, (jnp.int32(done), coefficients, moments, best, history), -after)
    by_name = {name: float(x) for name, x in zip(names, _q_by_name(fixed, best), strict=True)}
    entries = [(float(a), float(b)) for a, b in history[: done + 1]]
    return LearnedQ(by_name, min(b for _, b in entries), entries)


class _Fixed(NamedTuple):
    """Static arguments of a compiled step. layout: for every name of the delta the index of its coefficient,
    or -1 for the mean of all."""

    model: Model
    layout: tuple[int, ...]
    density: float


@jax.jit
def _rescaled(start: Params, masked: Params, q: dict[str, jax.Array]) -> Params:
    return apply_delta(start, rescale(masked, q))


def _cosine(learning_rate: float, step: int, steps: int) -> float:
    """optax's `cosine_decay_schedule` on the host: a device value would wait for all queued steps."""
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _optimizer(learning_rate: Any) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=0.01)


def _q_by_name(fixed: _Fixed, coefficients: jax.Array) -> list[jax.Array]:
    # Not `jnp.abs`, whose gradient at 0, the initial value, is 0.
    q = fixed.density + jnp.where(coefficients < 0, -coefficients, coefficients)
    return [q[i] if i >= 0 else jnp.mean(q) for i in fixed.layout]


@partial(jax.jit, static_argnums=0)
def _step(
    fixed: _Fixed,
    learning_rate: float,
    state: tuple[jax.Array, Any],
    start: Params,
    masked: Params,
    example: tuple[Batch, Reference],
) -> tuple[tuple[jax.Array, Any], jax.Array]:
    """One step: new coefficients and moments, and the change before it."""

    def loss(coefficients: jax.Array) -> jax.Array:
        q = dict(zip(flatten_names(masked), _q_by_name(fixed, coefficients), strict=True))
        total, count = output_change_sums(fixed.model, False, _rescaled(start, masked, q), *example)
        return total / count

    coefficients, moments = state
    value, gradient = jax.value_and_grad(loss)(coefficients)
    steps, moments = _optimizer(learning_rate).update(gradient, moments, coefficients)
    return (optax.apply_updates(coefficients, steps), moments), value
