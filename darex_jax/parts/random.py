"""The survivors of a random mask; the mask is recomputed from its key, so no indices are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.mask import survivor_chunks, survivor_indices, survivors, traced_threshold
from darex_jax.core.threefry import keep_threshold, threefry2x32
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.values import Array, Shape, Values, cell, check_q, on_device, reciprocal, values_from

BLOCK = 1 << 19  # entries of the mask that a matmul generates at a time


@partial(
    jax.tree_util.register_dataclass, data_fields=["values", "key", "q"], meta_fields=["drop_rate", "shape"]
)
@dataclass(frozen=True)
class Random:
    """`mask * values / q`: DARE and DAREx-q.

    Attributes:
      values: the survivors [S] in index order, before the division by q.
      key: uint32[2], the data of the parameter's own key (`core.tree.leaf_key`).
      q: divisor, a scalar.
      drop_rate: of the mask; shape: of the parameter.
    Source: DARE, arXiv:2311.03099; DAREx, arXiv:2410.09344.
    """

    kind: ClassVar[str] = "random"
    values: Values
    key: Array
    q: Array
    drop_rate: float
    shape: Shape

    def to_dense(self) -> jax.Array:
        """float32 [shape]; the mask is recomputed."""
        return _dense(on_device(self))

    def _to_dense(self) -> jax.Array:
        leaf_key = jax.random.wrap_key_data(self.key, impl="threefry2x32")
        mask = survivors(leaf_key, self.shape, *traced_threshold(self.drop_rate)).reshape(-1)
        index = jnp.arange(mask.size, dtype=jnp.uint32)
        return _spread(self, mask, jnp.int32(0), *cell(index, self.shape)).reshape(self.shape)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ dense.T`, [..., in] -> [..., out]; the mask is generated a block of rows at a time.

        For many products use `located().matmul`, which generates the mask once.

        Raises: DarexError for a drop rate of 0, and for 2^32 entries or more.
        """
        return _matmul(on_device(self), x)

    def _matmul(self, x: jax.Array) -> jax.Array:
        (out, width), threshold = self.shape, np.uint32(min(keep_threshold(self.drop_rate), 2**32 - 1))
        if out * width >= 2**32 or self.drop_rate == 0.0:
            raise DarexError("matmul needs a drop_rate above 0 and fewer than 2^32 entries: use to_dense().")
        rows = min(out, max(1, BLOCK // width))
        index = jnp.arange(rows * width, dtype=jnp.uint32)

        def block(used: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
            flat = first.astype(jnp.uint32) * np.uint32(width) + index
            high, low = threefry2x32(self.key, jnp.zeros_like(flat), flat)
            mask = ((high ^ low) < threshold) & (flat < np.uint32(out * width))
            weights = _spread(self, mask, used, *cell(flat, self.shape))
            product = jnp.einsum("...D,OD->O...", x, weights.reshape(rows, width))
            return used + jnp.sum(mask, dtype=jnp.int32), product

        firsts = jnp.arange(0, out, rows, dtype=jnp.int32)
        products = jax.lax.scan(block, jnp.int32(0), firsts)[1]
        return jnp.moveaxis(products.reshape(-1, *x.shape[:-1])[:out], 0, -1)

    def check_count(self) -> None:
        """Raises: DarexError unless the number of values is the mask's number of survivors; on the host."""
        size, threshold = int(np.prod(self.shape, dtype=np.int64)), keep_threshold(self.drop_rate)
        count = sum(len(kept) for _, kept in survivor_chunks(np.asarray(self.key), size, threshold, BLOCK))
        if count != len(self.values):
            raise DarexError(f"there are {len(self.values)} values, the mask has {count} survivors")

    def located(self) -> Sparse:
        """The same part with stored indices; on the host.

        Raises: DarexError unless the number of values is the mask's number of survivors.
        """
        size = int(np.prod(self.shape, dtype=np.int64))
        positions = survivor_indices(np.asarray(self.key), size, keep_threshold(self.drop_rate))
        if len(positions) != len(self.values):
            raise DarexError(f"there are {len(self.values)} values, the mask has {len(positions)} survivors")
        dtype = np.uint32 if size < 2**32 else np.uint64
        return Sparse(self.values, positions.astype(dtype), self.q, self.shape)

    def chunks(self, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Per chunk of `length` entries: the indices of the nonzero ones, and their float32 values."""
        part, size, used = jax.tree.map(np.asarray, self), int(np.prod(self.shape, dtype=np.int64)), 0
        for start, kept in survivor_chunks(part.key, size, keep_threshold(self.drop_rate), length):
            places = np.arange(used, used + len(kept))
            if used + len(kept) > len(self.values):
                raise DarexError("there are fewer values than the mask has survivors")
            numbers = part.values.read(places, *cell(start + kept, self.shape)) * reciprocal(part.q)
            yield kept, numbers
            used += len(kept)
        if used != len(self.values):
            raise DarexError("there are more values than the mask has survivors")

    def fields(self) -> dict[str, Any]:
        return {"q": float(self.q), "drop_rate": self.drop_rate, "values": self.values.fields()}

    def arrays(self) -> dict[str, np.ndarray]:
        return self.values.arrays()

    @classmethod
    def read(
        cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: Shape, key: np.ndarray
    ) -> Random:
        """Args: key: uint32[2]. Raises: DarexError unless this is a random part of this shape.

        `chunks`, which generates the mask, checks the number of values.
        """
        rate: Any = fields.get("drop_rate")
        if type(rate) not in (int, float):
            raise DarexError("drop_rate is not a number")
        keep_threshold(rate)
        form = fields.get("values") or {}
        count = max((x.size for name, x in arrays.items() if name != "scales"), default=0)
        width, size = shape[-1] if shape else 1, int(np.prod(shape, dtype=np.int64))
        values = values_from(form, arrays, (count,), size // width if width else 0, width)
        return cls(values, key, np.asarray(check_q(fields.get("q"))), float(rate), shape)


# Compiled once for each shape of a part: the closures of their loops are new at every call.
_dense, _matmul = jax.jit(Random._to_dense), jax.jit(Random._matmul)


def _spread(part: Random, mask: jax.Array, used: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Scatters the values, from index `used` on, to where the flat mask is True; zero elsewhere."""
    if not len(part.values):
        return jnp.zeros(mask.shape, jnp.float32)
    place = jnp.maximum(used + jnp.cumsum(mask, dtype=jnp.int32) - 1, 0)
    return jnp.where(mask, part.values.read(place, rows, columns) * reciprocal(part.q), 0.0)
