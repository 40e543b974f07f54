"""A part that stores the sign of every entry, and scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.parts.values import Array, Shape, cell, check_q, on_device, reciprocal

BLOCK = 1 << 19  # entries that a matmul unpacks at a time
SignPer = Literal["matrix", "row", "column"]


@partial(
    jax.tree_util.register_dataclass, data_fields=["packed", "scales", "q"], meta_fields=["per", "shape"]
)
@dataclass(frozen=True)
class Sign:
    """`scale * sign / q`.

    Attributes:
      packed: uint8 [ceil(size / 8)], entry i is bit i % 8 of byte i // 8, set where the sign is +.
      scales: floats, one for the matrix, each row or each column.
      q: divisor, a scalar.
      per: "matrix", "row" or "column".
      shape: of the parameter.
    Source: BitDelta, arXiv:2402.10193.
    """

    kind: ClassVar[str] = "sign"
    packed: Array
    scales: Array
    q: Array
    per: SignPer
    shape: Shape

    def to_dense(self) -> jax.Array:
        """float32 [shape]."""
        part, size = on_device(self), int(np.prod(self.shape, dtype=np.int64))
        plus = _unpacked(part.packed)[:size].reshape(self.shape)
        index = jnp.arange(size, dtype=jnp.int32).reshape(self.shape)
        scale = part._scale(index)
        return jnp.where(plus, scale, -scale)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ dense.T`, [..., in] -> [..., out]; unpacked a block of rows at a time."""
        return _matmul(on_device(self), x)

    def _matmul(self, x: jax.Array) -> jax.Array:
        out, width = self.shape
        whole = 8 // np.gcd(width, 8)  # number of rows that fill whole bytes
        rows = int(min(-(-out // whole), max(1, BLOCK // (width * whole))) * whole)
        blocks = -(-out // rows)
        padded = jnp.pad(self.packed, (0, blocks * rows * width // 8 - len(self.packed)))
        scale = self.scales.astype(jnp.float32) * reciprocal(self.q)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        inputs = x * scale if self.per == "column" else x

        def block(packed: jax.Array) -> jax.Array:
            sign = jnp.where(_unpacked(packed), 1.0, -1.0).reshape(rows, width)
            return jnp.einsum("...D,OD->O...", inputs, sign)

        products = jax.lax.map(block, padded.reshape(blocks, -1)).reshape(-1, *x.shape[:-1])[:out]
        y = jnp.moveaxis(products, 0, -1)
        return y if self.per == "column" else y * scale

    def chunks(self, length: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Per chunk of `length` entries: all of them, float32."""
        part, size = jax.tree.map(np.asarray, self), int(np.prod(self.shape, dtype=np.int64))
        for start in range(0, size, length):
            stop = min(start + length, size)
            bits = np.unpackbits(part.packed[start // 8 : -(-stop // 8)], bitorder="little")
            scale = part._scale(np.arange(start, stop))
            yield slice(None), np.where(bits[start % 8 :][: stop - start] != 0, scale, -scale)

    def _scale(self, index: Array) -> Array:
        rows, columns = cell(index, self.shape)
        number = {"matrix": index * 0, "row": rows, "column": columns}[self.per]
        return self.scales.astype(np.float32)[number] * reciprocal(self.q)

    def fields(self) -> dict[str, Any]:
        return {"q": float(self.q), "per": self.per}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"signs": np.asarray(self.packed), "scales": np.asarray(self.scales)}

    @classmethod
    def read(cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: Shape) -> Sign:
        """Raises: DarexError unless these are signs of a parameter of this shape."""
        packed, scales, per = arrays.get("signs"), arrays.get("scales"), fields.get("per")
        size, width = int(np.prod(shape, dtype=np.int64)), shape[-1] if shape else 1
        if packed is None or packed.dtype != np.uint8 or packed.size != -(-size // 8):
            raise DarexError("the number of signs is not the number of entries")
        groups = {"matrix": 1, "row": size // width if width else 0, "column": width}
        if per not in groups or scales is None or scales.dtype.kind not in "fV" or scales.size != groups[per]:
            raise DarexError("the scales are missing, or their number does not match")
        return cls(packed, scales, np.asarray(check_q(fields.get("q"))), per, shape)


_matmul = jax.jit(Sign._matmul)  # once for each shape: the closure of its loop is new at every call


def _unpacked(packed: jax.Array) -> jax.Array:
    bits = (packed[:, None] >> jnp.arange(8, dtype=jnp.uint8)[None]) & 1
    return bits.reshape(-1) != 0


def pack_signs(delta: jax.Array) -> jax.Array:
    """`Sign.packed` of a parameter's delta: + where an entry is not negative. Any shape -> uint8."""
    plus = jnp.reshape(delta, -1) >= 0
    padded = jnp.pad(plus, (0, -plus.size % 8)).reshape(-1, 8)
    return jnp.sum(padded.astype(jnp.uint8) << jnp.arange(8, dtype=jnp.uint8)[None], axis=1, dtype=jnp.uint8)
