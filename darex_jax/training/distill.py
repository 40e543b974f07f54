"""Distillation of parts: trains their values to reproduce the fine-tuned model's outputs.

No labels are used. All numbers stored in a delta's parts are trained, whatever their kind: survivors of a
random mask, largest entries, columns, factors, vectors, the scales of signs. Indices, keys, signs and shapes
are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from darex_jax.core.delta import apply_delta
from darex_jax.core.errors import DarexError
from darex_jax.core.memory import release_programs
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.models import DecoderConfig
from darex_jax.models import Model as WholeModel
from darex_jax.models.layerwise import LayerModel
from darex_jax.models.logits import of_logits
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.random import Random
from darex_jax.parts.rounding import rounded_part
from darex_jax.parts.sign import Sign
from darex_jax.parts.total import Part, Parts, values_of
from darex_jax.parts.values import Values, largest_integer, reciprocal
from darex_jax.tasks.batching import Batch, model_inputs, real_parts
from darex_jax.training.checkpoints import Checkpoints
from darex_jax.training.loop import warmup_linear

Model = WholeModel | LayerModel
Params = Any  # nested dict of float arrays, as `load_params` returns it
Flat = dict[str, Any]  # arrays by dotted name
Delta = dict[str, Parts]
MULTIPLES = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # candidate initial factors of the survivors
ROUNDING = 1 / 3  # share of steps with quantisation-aware training
# Adam's learning rates there: of integers, at most, and of scales relative to themselves.
INTEGER_RATE, SCALE_RATE = np.float32(0.03), np.float32(0.01)
STEPS = 600  # default
# Evaluations on held-out text before and with rounding, and the least steps between two: one takes as long as
# several steps.
LOOKS, APART = 8, 12


class Look(NamedTuple):
    """An evaluation on held-out text: number of steps, loss, and the share of predictions that equal the
    fine-tuned model's (with one output, the correlation of the scores; NaN without a head)."""

    step: int
    loss: float
    agreement: float


class Distilled(NamedTuple):
    """Parts with trained values as stored in a file; the initial factor of the survivors; and this call's
    evaluations on held-out text, the first before training, the last of the result."""

    parts: Delta
    multiple: float
    looks: list[Look]


def distill(
    model: Model,
    fine: Params,
    start: Params,
    parts: Any,
    batches: Callable[[int], Iterable[Batch]],
    held_out: Sequence[Batch],
    *,
    steps: int = STEPS,
    learning_rate: float = 2e-4,
    factor_rate: float = 0.13,
    bits: int | None = None,
    checkpoints: Path | None = None,
    on_look: Callable[[Look], None] = lambda look: None,
) -> Distilled:
    """Trains the values of `parts` so that the outputs of `start + parts` match those of `fine`.

    Adam with linear warm-up and decay. With `bits` the last third of the steps is quantisation-aware, with
    straight-through gradients. Returns the best of all evaluations on held-out text, including the initial
    one.

    Args:
      fine, start: the fine-tuned model's parameters, and the same with the base's values for parameters with
        parts.
      parts: with float values, a tree as a method returns it. Divisors are multiplied in (q is 1 afterwards);
        sparse and random ones start at the multiple of their values, possibly 0, with the lowest loss on
        held-out text.
      batches: of an epoch, counted from 0; held_out: other texts, used to select the result.
      learning_rate: for a dense delta; it is divided by each part's density.
      factor_rate: for the factors of a low rank, relative to the size of each rank's own values, and divided
        by the rank: a step moves all ranks together as far as it would move a single one.
      bits: 8, 4, 2 or 1 per value; None casts to bfloat16 at the end.
      checkpoints: a folder for this training only, from which it resumes bit for bit.
      on_look: called with every evaluation.
    Raises: DarexError for parts without float values, no text, or an encoder of several labels or
      scores; FloatingPointError once the loss is not finite.
    Source: trained survivors of a random mask, arXiv:2510.14444; straight-through gradients,
      arXiv:1308.3432, with scales as in arXiv:1902.08153.
    """
    parts = flatten_names(parts)
    if not parts or not held_out or steps < 3:
        raise DarexError("distillation needs at least one part, held-out text, and three steps.")
    placed = {name: each.map(_placed) for name, each in parts.items()}
    if not _split(placed)[0] or any(values.bits is not None for values in _split(dict(parts))[0]):
        raise DarexError("distillation needs parts with float values; pass `bits` to quantise the result.")
    _check_outputs(model)
    release_programs()  # of earlier trainings, whose parts had other shapes
    pair = _Pair(model, fine, start)
    seen = [(batch, jax.device_get(_reference(model, fine, batch))) for batch in held_out]
    multiples = MULTIPLES if any(p.kind == "sparse" for s in placed.values() for p in s.parts) else (1.0,)
    begun = {m: _look_at(pair, *_split(_times(placed, m)), seen) for m in multiples}
    multiple = min(begun, key=lambda m: begun[m].loss if math.isfinite(begun[m].loss) else math.inf)
    delta, looks = _times(placed, multiple), [begun[multiple]]
    on_look(looks[0])
    through = 0 if bits is None else round(ROUNDING * steps)
    stream = partial(_stream, batches)
    saved = None if checkpoints is None else checkpoints / "whole"

    def emit(look: Look) -> None:
        looks.append(look)
        on_look(look)

    rates, _ = _split(
        {name: each.map(partial(_rates, learning_rate, factor_rate)) for name, each in delta.items()}
    )
    trained, fixed = _split(delta)
    span = (0, steps - through)
    trained = _train(pair, trained, fixed, rates, stream, seen, span, saved, emit, looks[0].loss)
    if bits is not None:
        trained, fixed = _in_bits(_joined(trained, fixed), bits)
        rates = list(map(_integer_rates, trained, rates))
        saved = None if checkpoints is None else checkpoints / "rounded"
        span, loss = (steps - through, steps), _look_at(pair, trained, fixed, seen).loss
        trained = _train(pair, trained, fixed, rates, stream, seen, span, saved, emit, loss)
    stored = _bare(_joined(_stored(trained), fixed))
    emit(_look(model, fine, _applied(start, stored), seen)._replace(step=steps))
    found = {name: _unplaced(each, parts[name]) for name, each in stored.items()}
    return Distilled(found, multiple, looks)


class _Pair(NamedTuple):
    model: Model
    fine: Params
    start: Params


class _Reference(NamedTuple):
    """The fine-tuned model's outputs for a batch: last hidden states, and an encoder's logits."""

    hidden: jax.Array
    logits: jax.Array | None


Seen = Iterable[tuple[Batch, _Reference]]


def unsupported_outputs(model: Model) -> str | None:
    """What an encoder gives that is neither one class nor one score; None of all other models."""
    kind = getattr(model.config, "problem_type", None)
    if kind == "multi_label_classification":
        return "multi-label classification"
    several = kind == "regression" and getattr(model.config, "num_labels", 1) > 1
    return "a regression of several scores" if several else None


def _check_outputs(model: Model) -> None:
    if what := unsupported_outputs(model):
        raise DarexError(f"distillation does not support {what}.")


def look_at(model: Model, fine: Params, params: Params, held_out: Sequence[Batch]) -> Look:
    """Loss and agreement with the fine-tuned model, over texts or, for decoders, over tokens.

    Raises: DarexError for an encoder of several labels or several scores.
    """
    _check_outputs(model)
    return _look(model, fine, params, ((batch, _reference(model, fine, batch)) for batch in held_out))


def _look(model: Model, fine: Params, params: Params, held_out: Seen) -> Look:
    compared = [_compared(model, fine, params, batch, reference) for batch, reference in held_out]
    total, rows = np.sum([np.asarray(s[0], np.float64) for s in compared], axis=0)
    a, b, real = (np.concatenate([np.asarray(s[i]).reshape(-1) for s in compared]) for i in (1, 2, 3))
    a, b = a[real > 0], b[real > 0]
    if not len(b):
        agreement = math.nan
    elif np.issubdtype(a.dtype, np.integer):
        agreement = float(np.mean(a == b))
    else:
        agreement = float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0
    return Look(0, float(total / rows), agreement)


def _look_at(pair: _Pair, trained: Trained, fixed: Any, held_out: Seen) -> Look:
    return _look(pair.model, pair.fine, _with_values(pair.start, trained, fixed), held_out)


_applied = jax.jit(apply_delta)


@jax.jit
def _with_values(start: Params, trained: Trained, fixed: Any) -> Params:
    return apply_delta(start, _delta(trained, fixed))


def _stream(batches: Callable[[int], Iterable[Batch]], first: int, stop: int) -> Iterable[Batch]:
    return islice(chain.from_iterable(map(partial(_epoch, batches), count())), first, stop)


def _epoch(batches: Callable[[int], Iterable[Batch]], epoch: int) -> Iterable[Batch]:
    """The batches of one epoch. Raises: DarexError if there is none: all later epochs would be as empty."""
    own = iter(batches(epoch))
    first = next(own, None)
    if first is None:
        raise DarexError(
            f"batches({epoch}) has no batch; it is called once an epoch and returns a new iterable each time."
        )
    return chain([first], own)


def _train(
    pair: _Pair,
    trained: Trained,
    fixed: Any,
    rates: Trained,
    stream: Callable[[int, int], Iterable[Batch]],
    held_out: Seen,
    span: tuple[int, int],
    folder: Path | None,
    emit: Callable[[Look], None],
    begun: float,
) -> Trained:
    """Runs steps [first, stop) from `trained`, whose loss is `begun`; returns the best values evaluated."""
    first, stop = span
    schedule, every = warmup_linear(1.0, stop - first), max(APART, (stop - first) // LOOKS)
    state = _begin(trained)
    checkpoints = None if folder is None else Checkpoints(folder, every)
    done, best = 0, (begun if math.isfinite(begun) else math.inf, trained)
    if checkpoints is not None:
        placed = jax.tree.map(jnp.asarray, trained)  # restored to this device, whichever wrote it
        like = (placed, state, placed, np.zeros((), np.float64))
        if (found := checkpoints.restore(like)) is not None:
            done, (trained, state, values, loss) = found
            best = float(loss), values
    for number, batch in enumerate(stream(first + done, stop), done):
        reference = _reference(pair.model, pair.fine, batch)
        trained, state, loss = _step(pair, trained, state, fixed, rates, schedule(number), batch, reference)
        if (number + 1) % every == 0 or number + 1 == stop - first:
            if not math.isfinite(float(loss)):
                raise FloatingPointError(
                    f"distillation diverged: the loss is {float(loss)}; try a lower rate."
                )
            look = _look_at(pair, trained, fixed, held_out)._replace(step=first + number + 1)
            emit(look)
            if look.loss < best[0]:
                best = look.loss, trained
            if checkpoints is not None:
                kept = (trained, state, best[1], np.asarray(best[0], np.float64))
                checkpoints.save(number + 1, kept, -look.loss)
    return best[1]


_OPTIMIZER = optax.scale_by_adam()
_begin = jax.jit(_OPTIMIZER.init)


def _step(
    pair: _Pair,
    trained: Trained,
    state: Any,
    fixed: Any,
    rates: Trained,
    rate: Any,
    batch: Batch,
    reference: _Reference,
) -> tuple[Trained, Any, jax.Array]:
    """A step in three programs: only that of the model is compiled for every length of a batch, and none for
    both the lengths and the parts."""
    params = flatten_names(_with_values(pair.start, trained, fixed))
    pruned = {name: params.pop(name) for name in fixed}
    loss, gradient = _gradient(pair.model, pair.fine, pruned, params, batch, reference)
    return *_moved(gradient, trained, state, fixed, rates, rate), loss


@partial(jax.jit, static_argnums=0)
def _gradient(
    model: Model, fine: Params, pruned: Flat, others: Flat, batch: Batch, reference: _Reference
) -> tuple[jax.Array, Flat]:
    """The mean loss, and its gradient by the parameters that have parts."""

    def loss(pruned: Flat) -> jax.Array:
        params = unflatten_names(others | pruned)
        total, rows = _compared(model, fine, params, batch, reference)[0]
        return total / rows

    return jax.value_and_grad(loss)(pruned)


@jax.jit
def _moved(
    gradient: Flat, trained: Trained, state: Any, fixed: Any, rates: Trained, rate: Any
) -> tuple[Trained, Any]:
    """Adam's step of the parts' values, from the gradient by their sums."""

    def sums(trained: Trained) -> Flat:
        return {name: each.to_dense() for name, each in _delta(trained, fixed).items()}

    wide = {name: each.astype(jnp.float32) for name, each in gradient.items()}
    direction, state = _OPTIMIZER.update(jax.vjp(sums, trained)[1](wide)[0], state)
    return jax.tree.map(lambda x, step, own: x - rate * own * step, trained, direction, rates), state


@partial(jax.jit, static_argnums=0)
def _reference(model: Model, fine: Params, batch: Batch) -> _Reference:
    out: Any = model(fine, **model_inputs(batch))  # of a layer the batch's target
    decodes = isinstance(model.config, DecoderConfig)  # its logits would take much more memory
    return _Reference(out.last_hidden_state, None if decodes else out.logits)


@partial(jax.jit, static_argnums=0)
def _compared(
    model: Model, fine: Params, params: Params, batch: Batch, reference: _Reference
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The summed loss and its count; both models' predictions, and which of them count.

    Encoders: the KL divergence of the classes (squared difference for a single score), plus the relative
    squared error of the last hidden states. Decoders: the KL divergence of the next token.
    """
    inputs = model_inputs(batch)
    rows, real = real_parts(batch)
    if isinstance(model.config, DecoderConfig):
        head = model.module(fine)

        def of(logits: jax.Array, hidden: jax.Array) -> tuple[jax.Array, ...]:
            theirs = head.logits(hidden).astype(jnp.float32)
            return _divergence(theirs, logits), theirs.argmax(-1), logits.argmax(-1)

        divergence, theirs, ours = of_logits(of, model, params, inputs, reference.hidden)
        return (jnp.stack([jnp.sum(divergence * real), jnp.sum(real)]), theirs, ours, real)
    out: Any = model(params, **inputs)
    a, b = (x.astype(jnp.float32) * real[..., None] for x in (reference.hidden, out.last_hidden_state))
    change = jnp.sum(jnp.square(a - b), (1, 2)) / jnp.maximum(jnp.sum(jnp.square(a), (1, 2)), 1e-12)
    if reference.logits is None:
        nothing = jnp.zeros(0, jnp.int32)
        return jnp.stack([jnp.sum(change * rows), jnp.sum(rows)]), nothing, nothing, nothing
    theirs, ours = (x.astype(jnp.float32) for x in (reference.logits, out.logits))
    if ours.shape[-1] == 1:
        change = change + jnp.square(theirs - ours)[:, 0]
        theirs, ours = theirs[:, 0], ours[:, 0]
    else:
        change = change + _divergence(theirs, ours)
        theirs, ours = theirs.argmax(-1), ours.argmax(-1)
    return jnp.stack([jnp.sum(change * rows), jnp.sum(rows)]), theirs, ours, rows


def _divergence(theirs: jax.Array, ours: jax.Array) -> jax.Array:
    """KL(theirs || ours) of logits."""
    known, guessed = jax.nn.log_softmax(theirs), jax.nn.log_softmax(ours)
    return jnp.sum(jnp.exp(known) * (known - guessed), axis=-1)


# A delta is trained as the list of its `Values`: their numbers, and with bits the logarithms of the scales.
# Outside of one program for all of them arrays are NumPy's: JAX would compile each operation for each shape.
Trained = list[Values]


def _split(delta: Delta) -> tuple[Trained, Any]:
    """The values of all parts, in tree order, and the tree with None in their places."""
    structure: Any
    leaves, structure = jax.tree.flatten(delta, is_leaf=_is_values)
    fixed = structure.unflatten([None if _is_values(leaf) else leaf for leaf in leaves])
    return [leaf for leaf in leaves if _is_values(leaf)], fixed


def _joined(values: Iterable[Values], fixed: Any) -> Delta:
    """The inverse of `_split`."""
    remaining = iter(values)
    return jax.tree.map(
        lambda leaf: next(remaining) if leaf is None else leaf, fixed, is_leaf=lambda x: x is None
    )


def _is_values(node: Any) -> bool:
    return isinstance(node, Values)


def _delta(trained: Trained, fixed: Any) -> Delta:
    """The delta of a step: with bits, of integers with straight-through gradients."""
    return _bare(_joined(map(_through, trained), fixed))


def _through(values: Values) -> Values:
    """Rounds to integers with a straight-through gradient, clipped to the integer range."""
    if values.bits is None:
        return values
    most = largest_integer(values.bits)
    numbers = jnp.clip(values.numbers, -most, most)
    integers = jnp.where(numbers < 0, -1.0, 1.0) if values.bits == 1 else jnp.round(numbers)
    straight = numbers + jax.lax.stop_gradient(integers - numbers)
    return replace(values, numbers=straight, scales=jnp.exp(jnp.asarray(values.scales)))


def _placed(part: Any) -> Any:
    """A part in trainable form: float32, divisor multiplied in, random masks as indices, scales of signs as
    values."""
    if isinstance(part, Random):
        part = part.located()
    if isinstance(part, Sign):
        part = replace(part, scales=Values(part.scales))
    numbers = {name: np.asarray(v.numbers, np.float32) for name, v in values_of(part).items()}
    if not numbers:
        return part
    first = next(iter(numbers))
    numbers[first] = numbers[first] * reciprocal(np.asarray(part.q))
    found = {name: Values(x) for name, x in numbers.items()}
    return replace(part, q=np.asarray(np.float32(1)), **found)


def _bare(delta: Delta) -> Delta:
    """Undoes `_placed` for signs: their scales as an array."""

    def of(part: Any) -> Part:
        return replace(part, scales=part.scales.numbers) if isinstance(part, Sign) else part

    return {name: each.map(of) for name, each in delta.items()}


def _unplaced(parts: Parts, original: Parts) -> Parts:
    """Undoes `_placed` for random parts: back to masks without indices."""
    before = iter(original.parts)

    def of(part: Any) -> Part:
        own = next(before)
        return replace(own, values=part.values, q=part.q) if isinstance(own, Random) else part

    return parts.map(of)


def _times(delta: Delta, multiple: float) -> Delta:
    """Multiplies sparse parts by a number."""

    def of(part: Any) -> Part:
        if part.kind != "sparse":
            return part
        return replace(part, values=Values(part.values.numbers * np.float32(multiple)))

    return {name: each.map(of) for name, each in delta.items()}


def _rates(learning_rate: float, factor_rate: float, part: Any) -> Part:
    """Learning rates of Adam, see `distill`. Scales of signs have a dense delta's: they move many entries."""
    if isinstance(part, Sign):
        return replace(part, scales=Values(np.float32(learning_rate)))
    if isinstance(part, LowRank):
        a, b = (np.asarray(values.numbers) for values in (part.a, part.b))
        sizes = [np.sqrt(np.mean(np.square(x), axis)) for x, axis in ((a, 0), (b, 1))]
        relative = np.float32(factor_rate / max(1, part.rank))
        own = [relative * np.where(x > 0, x, other) for x, other in (sizes, sizes[::-1])]
        return replace(part, a=Values(own[0][None]), b=Values(own[1][:, None]))
    density = max(1, sum(map(len, values_of(part).values()))) / max(1, math.prod(part.shape))
    rate = np.float32(learning_rate / density)
    return replace(part, **{name: Values(rate) for name in values_of(part)})


def _integer_rates(trained: Values, rate: Values) -> Values:
    """The rates of integers with logarithms of scales, which move no further than their floats did."""
    if trained.bits is None:
        return rate
    steps = np.asarray(rate.numbers) / _beside(replace(trained, scales=np.exp(np.asarray(trained.scales))))
    return replace(trained, numbers=np.minimum(INTEGER_RATE, steps), scales=SCALE_RATE)


def _beside(values: Values) -> Any:
    """Scales in a shape that broadcasts against the numbers."""
    scales: Any = values.scales
    if values.per == "column":
        return scales[None]
    return scales[:, None] if values.per == "row" else scales[0]


def _in_bits(delta: Delta, bits: int) -> tuple[Trained, Any]:
    """`_split` with values relative to their scales, and the logarithms of the scales; signs stay."""

    def fitted(part: Part) -> Part:
        return part if isinstance(part, Sign) else rounded_part(part, bits, jnp.float32, coarse=True)

    def of(values: Any, fitted: Any) -> Any:
        if not _is_values(values) or fitted.bits is None:
            return values
        scales = np.maximum(fitted.scales, np.float32(1e-12))
        found = replace(fitted, scales=scales)
        return replace(found, numbers=np.asarray(values.numbers) / _beside(found))

    quantised = {name: parts.map(fitted) for name, parts in delta.items()}
    trained, fixed = _split(jax.tree.map(of, delta, quantised, is_leaf=_is_values))
    return _with_logarithms(trained), fixed


@jax.jit
def _with_logarithms(trained: Trained) -> Trained:
    def of(values: Values) -> Values:
        if values.bits is None:
            return values
        return replace(values, scales=jnp.log(jnp.asarray(values.scales)))

    return list(map(of, trained))


@jax.jit
def _stored(trained: Trained) -> Trained:
    """Values as stored in a file: bfloat16, or integers with bfloat16 scales."""

    def of(values: Values) -> Values:
        if values.bits is None:
            return Values(values.numbers.astype(jnp.bfloat16))
        integers = jnp.round(values.numbers).astype(jnp.int8)
        return replace(values, numbers=integers, scales=jnp.asarray(values.scales, jnp.bfloat16))

    return [of(_through(values)) for values in trained]
