"""A sparse part: survivors with stored indices, the largest entries for example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.parts.values import Array, Shape, Values, cell, check_q, on_device, reciprocal, values_from

PRODUCTS = 1 << 21  # products held at a time, so that they fit in the cache
BLOCKS = 8  # row blocks that the matrix is materialised in


@partial(jax.tree_util.register_dataclass, data_fields=["values", "positions", "q"], meta_fields=["shape"])
@dataclass(frozen=True)
class Sparse:
    """`values / q` at `positions`, zero elsewhere.

    Attributes:
      values: [S].
      positions: increasing flat indices [S], integers of any width.
      q: divisor, a scalar.
      shape: of the parameter.
    """

    kind: ClassVar[str] = "sparse"
    values: Values
    positions: Array
    q: Array
    shape: Shape

    def to_dense(self) -> jax.Array:
        """float32 [shape]. Raises: DarexError for 2^32 entries or more without JAX's 64 bits."""
        part = self._on_device()
        numbers = part.numbers()
        flat = jnp.zeros(self._size, jnp.float32).at[part.positions].set(numbers, unique_indices=True)
        return flat.reshape(self.shape)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ dense.T`, [..., in] -> [..., out].

        For few inputs relative to the stored entries, a gather and a segment sum; for many, an eighth of the
        matrix is materialised at a time.

        Raises: as `to_dense`.
        """
        return _matmul(self._on_device(), x)

    def _matmul(self, x: jax.Array) -> jax.Array:
        out, width = self.shape
        numbers, flat = self.numbers(), x.reshape(-1, width)
        by = _by_blocks if len(flat) * len(numbers) > out * width / 2 else _by_entries
        return by(self.positions, numbers, flat, out).reshape(*x.shape[:-1], out)

    def numbers(self) -> Array:
        """The entries at `positions`, float32 [S]."""
        return self.values.read(None, *cell(self._wide().positions, self.shape)) * reciprocal(self.q)

    @property
    def _size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def _wide(self) -> Sparse:
        """Positions in one dtype, which holds every edge of the matrix and wraps around below 0."""
        wide = np.uint32 if self._size < 2**32 else np.uint64
        return replace(self, positions=self.positions.astype(wide, copy=False))

    def _on_device(self) -> Sparse:
        if self._size >= 2**32 and not jax.config.read("jax_enable_x64"):
            raise DarexError(
                f"a sparse part of shape {list(self.shape)} has positions that JAX's 32 bits do not hold: "
                "set jax_enable_x64, or read it with chunks()."
            )
        return on_device(self)._wide()

    def chunks(self, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Per chunk of `length` entries: the indices of the nonzero ones, and their float32 values."""
        part, size = jax.tree.map(np.asarray, self)._wide(), self._size
        starts, positions, numbers = range(0, size, length), part.positions, part.numbers()
        bounds = np.searchsorted(positions, np.asarray([*starts, size], positions.dtype))
        for start, first, stop in zip(starts, bounds, bounds[1:], strict=False):
            yield positions[first:stop].astype(np.int64) - start, numbers[first:stop]

    def fields(self) -> dict[str, Any]:
        return {"q": float(self.q), "values": self.values.fields()}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"positions": np.asarray(self.positions), **self.values.arrays()}

    @classmethod
    def read(cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: Shape) -> Sparse:
        """Raises: DarexError unless this is a sparse part of this shape."""
        positions, size = arrays.get("positions"), int(np.prod(shape, dtype=np.int64))
        if positions is None or positions.dtype.kind != "u":
            raise DarexError("positions are missing")
        if positions.size and (int(positions[-1]) >= size or not (positions[1:] > positions[:-1]).all()):
            raise DarexError("positions are not increasing, or outside of the parameter")
        width = shape[-1] if shape else 1
        rows = size // width if width else 0
        values = values_from(fields.get("values") or {}, arrays, positions.shape, rows, width)
        return cls(values, positions, np.asarray(check_q(fields.get("q"))), shape)


_matmul = jax.jit(Sparse._matmul)  # once for each shape: the closures of its loops are new at every call


def _by_entries(positions: jax.Array, numbers: jax.Array, x: jax.Array, out: int) -> jax.Array:
    rows, columns = cell(positions, (out, x.shape[1]))

    def one(row: jax.Array) -> jax.Array:
        products = row[columns] * numbers
        return jax.ops.segment_sum(products, rows, out, indices_are_sorted=True)

    together = max(1, min(len(x), PRODUCTS // max(1, len(numbers))))
    return jax.lax.map(one, x, batch_size=together)


def _by_blocks(positions: jax.Array, numbers: jax.Array, x: jax.Array, out: int) -> jax.Array:
    width = x.shape[1]
    rows = -(-out // BLOCKS)

    def block(first: jax.Array) -> jax.Array:
        place = positions - first.astype(positions.dtype) * np.asarray(width, positions.dtype)
        # Positions before the block wrap around to large numbers, and are dropped like those after it.
        flat = jnp.zeros(rows * width, jnp.float32).at[place].set(numbers, mode="drop", unique_indices=True)
        return jnp.einsum("ND,OD->ON", x, flat.reshape(rows, width))

    products = jax.lax.map(block, jnp.arange(0, out, rows, dtype=jnp.int32))
    return products.reshape(-1, len(x))[:out].T
