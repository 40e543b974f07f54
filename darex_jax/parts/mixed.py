"""A parameter for batches whose rows use different deltas (multi-delta serving)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.parts.columns import Columns
from darex_jax.parts.dense import Dense
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.random import Random
from darex_jax.parts.sign import Sign
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.total import Part, Parts
from darex_jax.parts.values import Array, Shape, Values, reciprocal

LARGE = 1 << 18  # entries; dense parts above it are processed row by row


@partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "places"], meta_fields=["shape", "longest_row"]
)
@dataclass(frozen=True)
class Stack:
    """The deltas of one parameter in several models, stacked and padded to common shapes.

    Attributes:
      parts: one part per kind, its arrays [M + 1, ...]: index 0 is zero, then the deltas that have this kind.
      places: for each of `parts` int32 [N], the index of each of the N deltas in it.
      shape: of the parameter.
      longest_row: most entries in a row of a sparse part.
    """

    parts: tuple[Part, ...]
    places: tuple[Array, ...]
    shape: Shape
    longest_row: int = 0

    def delta(self, number: Array) -> jax.Array:
        """The delta at this index, float32 [shape]; equal within rounding to what its file restores."""
        total = jnp.zeros(self.shape, jnp.float32)
        for part, places in zip(self.parts, self.places, strict=True):
            total = total + _at(part, places[number]).to_dense()
        return total


@partial(jax.tree_util.register_dataclass, data_fields=["base", "stack", "numbers"], meta_fields=[])
@dataclass(frozen=True)
class Mixed:
    """`base + delta numbers[i]` for row i of a batch: a params leaf that replaces an array.

    Attributes: base: the parameter; stack: its deltas; numbers: int32 [B], the delta index of each row.
    """

    base: Any
    stack: Stack
    numbers: Array

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def product(self, x: jax.Array) -> jax.Array:
        """The deltas' contribution to `x @ base.T`: [B, ..., in] -> [B, ..., out], by each part's matmul."""
        self._check_rows(len(x))
        total = jnp.zeros((*x.shape[:-1], self.stack.shape[0]), jnp.float32)
        for part, places in self._stacked():
            total = total + _product(part, places, x)
        return total

    def rows(self, ids: jax.Array) -> jax.Array:
        """The deltas' contribution to an embedding lookup: ids [B or 1, T] -> [B, T, in]."""
        if len(ids) > 1:
            self._check_rows(len(ids))
        ids = jnp.broadcast_to(ids, (len(self.numbers), ids.shape[1]))
        total = jnp.zeros((*ids.shape, self.stack.shape[1]), jnp.float32)
        for part, places in self._stacked():
            total = total + _rows(part, places[:, None], ids, self.stack.longest_row)
        return total

    def vectors(self) -> jax.Array:
        """The deltas of a vector parameter: float32 [B, length]."""
        total = jnp.zeros((len(self.numbers), *self.stack.shape), jnp.float32)
        for part, places in self._stacked():
            total = total + jax.vmap(lambda n, part=part: _at(part, n).to_dense())(places)
        return total

    def _check_rows(self, count: int) -> None:
        if count != len(self.numbers):
            raise DarexError(
                f"the batch has {count} rows, its parameters are for {len(self.numbers)} deltas."
            )

    def _stacked(self) -> list[tuple[Any, jax.Array]]:
        """Each stacked part with every row's index in it."""
        pairs = zip(self.stack.parts, self.stack.places, strict=True)
        return [(part, jnp.asarray(places)[self.numbers]) for part, places in pairs]


def stack_parts(deltas: Sequence[Parts | None]) -> Stack:
    """Stacks the deltas of one parameter, on the host; None is zero.

    Quantised values are decoded to float32, random masks to indices, and divisors are multiplied in. Shapes
    are rounded up, so that another delta of similar size does not recompile.
    """
    shape = next(d.shape for d in deltas if d is not None)
    groups: dict[tuple[Any, ...], dict[int, Any]] = defaultdict(dict)
    for number, delta in enumerate(deltas):
        if delta is None:
            continue
        for part in _canonical(delta):
            kind = (part.kind, part.per) if isinstance(part, Sign) else (part.kind,)
            times = sum(1 for group, of in groups.items() if group[:-1] == kind and number in of)
            groups[(*kind, times)][number] = part
    parts, places, longest = [], [], 0
    for (kind, *_), of in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        parts.append(_stacked(kind, list(of.values()), shape))
        place = np.zeros(len(deltas), np.int32)
        place[list(of)] = np.arange(1, len(of) + 1)
        places.append(place)
        if kind == Sparse.kind:
            counts = [
                np.bincount(p.positions.astype(np.int64) // shape[-1]).max(initial=0) for p in of.values()
            ]
            longest = max(longest, *map(int, counts))
    return Stack(tuple(parts), tuple(places), shape, rounded_up(longest))


def rounded_up(count: int) -> int:
    """The smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `count`: at most half more."""
    if count < 3:
        return count
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if count <= 3 * power // 4 else power


def written_out(delta: Parts) -> Parts:
    """The same parts on the host, random masks replaced by stored indices.

    Raises: DarexError for a random part whose number of values differs from its mask's survivors.
    """
    host = delta.map(lambda part: jax.tree.map(np.asarray, part))
    return host.map(lambda part: part.located() if isinstance(part, Random) else part)


def _canonical(delta: Parts) -> list[Any]:
    """The parts with masks as indices; a vector becomes one dense part."""
    host = written_out(delta).parts
    if len(delta.shape) == 2:
        return list(host)
    flat = np.zeros(int(np.prod(delta.shape, dtype=np.int64)), np.float32)
    for part in host:
        for index, numbers in part.chunks(max(1, flat.size)):
            flat[index] += numbers
    return [Dense(Values(flat.reshape(delta.shape)), np.float32(1), delta.shape)]


def _stacked(kind: str, parts: list[Any], shape: Shape) -> Part:
    """Stacks parts of one kind after a zero entry, padded to one size and to a rounded count."""

    def all_of(arrays: list[np.ndarray], *sizes: int, fill: Any = 0) -> np.ndarray:
        together = np.full((1 + rounded_up(len(arrays)), *sizes), fill, arrays[0].dtype)
        for i, array in enumerate(arrays):
            place: Any = (i + 1, *map(slice, array.shape))
            together[place] = array
        return together

    q = np.ones(1 + rounded_up(len(parts)), np.float32)
    if kind == LowRank.kind:
        rank = rounded_up(max(part.rank for part in parts))
        factors = [part.factors() for part in parts]
        a = all_of(
            [a * reciprocal(part.q) for (a, _), part in zip(factors, parts, strict=True)], shape[0], rank
        )
        return LowRank(Values(a), Values(all_of([b for _, b in factors], rank, shape[1])), q, shape)
    if kind == Sparse.kind:
        count = rounded_up(max(len(part.positions) for part in parts))
        size = shape[0] * shape[1]
        wide = np.uint32 if size < 2**32 else np.uint64
        positions = all_of([part.positions.astype(wide) for part in parts], count, fill=size)
        return Sparse(Values(all_of([part.numbers() for part in parts], count)), positions, q, shape)
    if kind == Columns.kind:
        count = rounded_up(max(len(part.columns) for part in parts))
        columns = all_of([part.columns.astype(np.int32) for part in parts], count, fill=shape[1])
        return Columns(Values(all_of([part.numbers() for part in parts], shape[0], count)), columns, q, shape)
    if kind == Sign.kind:
        scales = [part.scales.astype(np.float32) * reciprocal(part.q) for part in parts]
        packed = all_of([part.packed for part in parts], parts[0].packed.size)
        return Sign(packed, all_of(scales, scales[0].size), q, parts[0].per, shape)
    cells: Any = np.ogrid[tuple(map(slice, shape))] if len(shape) == 2 else ()
    dense = [part.values.read(None, *cells) * reciprocal(part.q) for part in parts]
    return Dense(Values(all_of(dense, *shape)), q, shape)


def _at(part: Any, number: Array) -> Any:
    """The part at an index of a stacked part."""
    return jax.tree.map(lambda array: jnp.asarray(array)[number], part)


@jax.jit  # closures are new at every call
def _product(part: Any, number: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies each row of x [B, ..., in] by the part at its index [B]: [B, ..., out]."""
    if isinstance(part, LowRank):  # batched einsum: half the time of vmap on a CPU
        inner = jnp.einsum("B...D,BRD->B...R", x, jnp.asarray(part.b.numbers)[number])
        return jnp.einsum("B...R,BOR->B...O", inner, jnp.asarray(part.a.numbers)[number])
    if isinstance(part, Dense) and np.prod(part.shape) > LARGE:  # row by row, to save memory
        return jax.lax.map(lambda row: _at(part, row[0]).matmul(row[1]), (number, x))
    return jax.vmap(lambda n, x: _at(part, n).matmul(x))(number, x)


def _rows(part: Any, number: jax.Array, ids: jax.Array, longest: int) -> jax.Array:
    """Rows `ids` [B, T] of the parts at these indices [B, 1], without materialising any: [B, T, in]."""
    part, width = jax.tree.map(jnp.asarray, part), part.shape[-1]
    match part:
        case LowRank():
            return jnp.einsum("BTR,BRD->BTD", part.a.numbers[number, ids], part.b.numbers[number[:, 0]])
        case Dense():
            return part.values.numbers[number, ids]
        case Columns():
            return _spread(part.columns[number], part.values.numbers[number, ids], width)
        case Sign():
            place = (ids * width)[..., None] + jnp.arange(width)[None, None]
            plus = (part.packed[number[..., None], place // 8] >> (place % 8).astype(jnp.uint8)) & 1
            of = {
                "matrix": 0 * ids[..., None],
                "row": ids[..., None],
                "column": jnp.arange(width)[None, None],
            }
            scale = part.scales[number[..., None], of[part.per]]
            return jnp.where(plus != 0, scale, -scale)
        case Sparse():
            wide = part.positions.dtype
            first = _first(part.positions, number, ids.astype(wide) * np.asarray(width, wide))
            place = first[..., None] + jnp.arange(longest)[None, None]
            position = part.positions.at[number[..., None], place].get(
                mode="fill", fill_value=np.iinfo(wide).max
            )
            own = position // np.asarray(width, wide) == ids[..., None].astype(wide)
            values = part.values.numbers.at[number[..., None], place].get(mode="fill", fill_value=0)
            columns = (position % np.asarray(width, wide)).astype(jnp.int32)
            return _spread(columns, jnp.where(own, values, 0.0), width)
    raise TypeError(part)


def _spread(columns: jax.Array, values: jax.Array, width: int) -> jax.Array:
    """Scatters values [B, T, K] to their columns, adding duplicates: [B, T, width]."""
    columns = jnp.broadcast_to(columns, values.shape)
    into = jnp.zeros((*values.shape[:-1], width), jnp.float32)
    b, t = jnp.ogrid[: values.shape[0], : values.shape[1]]
    return into.at[b[..., None], t[..., None], columns].add(values)


def _first(positions: jax.Array, number: jax.Array, target: jax.Array) -> jax.Array:
    """How many of the increasing `positions[number]` are below the target, by binary search: [B, T]."""
    low = jnp.zeros(target.shape, jnp.int32)
    high = jnp.full(target.shape, positions.shape[1], jnp.int32)
    for _ in range(positions.shape[1].bit_length()):
        middle = (low + high) // 2
        below = positions.at[number, middle].get(mode="clip") < target
        low, high = jnp.where(below & (low < high), middle + 1, low), jnp.where(below, high, middle)
    return low
