"""The values of a part: floats, or quantised integers with scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.divisor import is_q
from darex_jax.core.errors import DarexError

Array = Any  # a NumPy or a JAX array
BITS = (8, 4, 2, 1)
Per = Literal["matrix", "row", "column"] | int
Shape = tuple[int, ...]
PADDED, GROUPS = 1 << 12, 1 << 6  # the least numbers, and groups of them, that are fitted
FITS = 8  # alternating least-squares iterations of integers and scales


@partial(jax.tree_util.register_dataclass, data_fields=["numbers", "scales"], meta_fields=["bits", "per"])
@dataclass(frozen=True)
class Values:
    """Values stored as `scale * integer`, or as floats.

    Attributes:
      numbers: any shape; floats of any dtype, or int8 with `bits`.
      scales: floats [groups], one for each group of integers; None for floats.
      bits: 8, 4, 2 (integers of magnitude up to 2^(bits-1) - 1) or 1 (-1 and 1); None for floats.
      per: the group that shares a scale: the "matrix", a "row" or a "column" of the parameter, or this many
        consecutive values.
    """

    numbers: Array
    scales: Array | None = None
    bits: int | None = None
    per: Per = "matrix"

    def __len__(self) -> int:
        return int(np.prod(np.shape(self.numbers), dtype=np.int64))

    def read(self, places: Array = None, rows: Array = None, columns: Array = None) -> Array:
        """All values in float32, or those at flat indices `places`; at most one multiplication each.

        Args: rows, columns: the values' row and column indices in the parameter, which broadcast against
          them; needed for scales per row or per column.
        """
        numbers = self.numbers if places is None else self.numbers[places]
        if self.bits is None:
            return numbers.astype(np.float32)
        assert self.scales is not None
        if self.per == "matrix":
            scale = self.scales[0]
        elif self.per in ("row", "column"):
            scale = self.scales[rows if self.per == "row" else columns]
        else:
            if places is None:
                places = np.arange(len(self)).reshape(np.shape(numbers))
            scale = self.scales[places // self.per]
        return numbers.astype(np.float32) * scale.astype(np.float32)

    def fields(self) -> dict[str, Any]:
        """The metadata that a file stores; {} for floats."""
        return {} if self.bits is None else {"bits": self.bits, "per": self.per}

    def arrays(self) -> dict[str, np.ndarray]:
        """The flat arrays that a file stores: `values`, or `int8`, `int4`, ... and `scales`."""
        if self.bits is None:
            return {"values": np.asarray(self.numbers).reshape(-1)}
        return {
            f"int{self.bits}": np.asarray(self.numbers).reshape(-1),
            "scales": np.asarray(self.scales).reshape(-1),
        }


def values_from(
    fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: Shape, rows: int, columns: int
) -> Values:
    """The inverse of `fields` and `arrays`, which may come from an untrusted file.

    Args: shape: of the values; rows, columns: numbers of scales if they are per row or per column.
    Raises: DarexError unless they are valid values of that shape.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if not fields:
        numbers = arrays.get("values")
        if numbers is None or numbers.dtype.kind not in "fV" or numbers.size != size:
            raise DarexError(f"expected {size} floating values")
        return Values(numbers.reshape(shape))
    if not isinstance(fields, Mapping):
        raise DarexError("the metadata of the values is not an object")
    bits, per = fields.get("bits"), fields.get("per")
    if bits not in BITS or not (per in ("matrix", "row", "column") or (type(per) is int and per > 0)):
        raise DarexError("unknown bits or scale groups of values")
    numbers, scales = arrays.get(f"int{bits}"), arrays.get("scales")
    groups = -(-size // per) if isinstance(per, int) else {"matrix": 1, "row": rows, "column": columns}[per]
    if numbers is None or numbers.dtype != np.int8 or numbers.size != size:
        raise DarexError(f"expected {size} integers")
    if scales is None or scales.dtype.kind not in "fV" or scales.size != groups:
        raise DarexError(f"expected {groups} scales")
    most = largest_integer(bits)
    if size and (numbers.max() > most or numbers.min() < -most or (bits == 1 and not numbers.all())):
        raise DarexError(f"an integer does not fit in {bits} bits")
    return Values(numbers.reshape(shape), scales, bits, per)


def largest_integer(bits: int) -> int:
    return 1 if bits == 1 else 2 ** (bits - 1) - 1


def quantise(
    numbers: Array,
    bits: int | None,
    per: Per = "matrix",
    *,
    rows: Array = None,
    columns: Array = None,
    shape: tuple[int, int] | None = None,
    dtype: Any = jnp.bfloat16,
    least: float = 0.0,
) -> Values:
    """Quantises `numbers` by least squares.

    One bit: the sign (+ for 0) and the mean magnitude, which is the optimal scale. More bits: nearest
    integers and optimal scales, alternately.

    Args:
      numbers: floats, any shape.
      bits: None casts to `dtype` only, or not at all if that is None.
      per, rows, columns: as in `Values`; rows and columns broadcast against `numbers`.
      shape: [rows, columns] of the parameter, for scales per row or per column.
      dtype: of the scales; None is bfloat16.
      least: with two bits or more, integers are nearest for scales of at least this many root mean squares
        of their group; fewer different integers take fewer bits once they are entropy-coded.
    Raises: DarexError for other bits.
    """
    # Concrete arrays are padded and sliced by NumPy: JAX would compile that for every size.
    traced = any(isinstance(x, jax.core.Tracer) for x in (numbers, rows, columns))
    xp: Any = jnp if traced else np
    x = xp.asarray(numbers)
    if bits is None:
        return Values(x if dtype is None else x.astype(dtype))
    if bits not in BITS:
        raise DarexError(f"values have {', '.join(map(str, BITS))} bits, got {bits}.")
    if per == "matrix":
        group, groups = xp.zeros(x.shape, np.int32), 1
    elif isinstance(per, int):
        group, groups = xp.arange(x.size, dtype=np.int32).reshape(x.shape) // per, -(-x.size // per)
    else:
        group = xp.broadcast_to(xp.asarray(rows if per == "row" else columns, np.int32), x.shape)
        groups = (shape or x.shape)[0 if per == "row" else 1]
    # Padded to powers of two, with a separate group, so that few programs are compiled.
    more = _padded(x.size, PADDED) - x.size
    filled = xp.pad(x.astype(np.float32).reshape(-1), (0, more))
    of = xp.pad(group.reshape(-1), (0, more), constant_values=groups)
    integers, scales = _fit(filled, of, _padded(groups + 1, GROUPS), bits, least)
    if not isinstance(integers, jax.core.Tracer):
        integers, scales = np.asarray(integers), np.asarray(scales)
    scales = scales[:groups].astype(jnp.bfloat16 if dtype is None else dtype)
    return Values(integers[: x.size].reshape(x.shape), scales, bits, per)


def _padded(size: int, least: int) -> int:
    return max(least, 1 << max(0, size - 1).bit_length())


@partial(jax.jit, static_argnums=(2, 3))
def _fit(
    x: jax.Array, group: jax.Array, groups: int, bits: int, least: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    def total(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, group, groups)

    def ratio(above: jax.Array, below: jax.Array, other: jax.Array | float) -> jax.Array:
        return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), other)

    count, most = total(jnp.ones_like(x)), largest_integer(bits)
    if bits == 1:
        return jnp.where(x < 0, -1, 1).astype(jnp.int8), ratio(total(jnp.abs(x)), count, 0.0)

    def nearest(scales: jax.Array) -> jax.Array:
        scale = scales[group]
        return jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1.0)), -most, most)

    def refit(_: int, scales: jax.Array) -> jax.Array:
        integers = nearest(scales)
        return ratio(total(integers * x), total(integers * integers), scales)

    largest = jnp.maximum(jax.ops.segment_max(jnp.abs(x), group, groups), 0.0)
    # With few bits and a long tail the largest magnitude would be too large an initial step.
    size = jnp.sqrt(ratio(total(x * x), count, 0.0))
    start = jnp.minimum(largest, 3.0 * size) / most
    scales = jax.lax.fori_loop(0, FITS, refit, largest / most if bits == 8 else start)
    integers = nearest(jnp.maximum(scales, least * size))
    return integers.astype(jnp.int8), ratio(total(integers * x), total(integers * integers), scales)


def on_device(part: Any) -> Any:
    """The part with JAX arrays, so that it can be indexed inside jit."""
    return jax.tree.map(jnp.asarray, part)


def reciprocal(q: Array) -> Array:
    """1/q in float32, by which values are multiplied."""
    return np.float32(1) / q.astype(np.float32)


def cell(index: Array, shape: Shape) -> tuple[Array, Array]:
    """Row and column of flat indices in a matrix; in a vector the row is 0."""
    width = shape[-1] if shape else 1
    return index // width, index % width


def check_q(q: Any) -> np.float32:
    """A divisor as float32. Raises: DarexError unless it and its reciprocal are positive normal numbers."""
    if type(q) not in (int, float) or not is_q(q):
        raise DarexError("q is not a positive number that float32 can represent")
    return np.float32(q)
