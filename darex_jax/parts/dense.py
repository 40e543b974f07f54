"""A part that stores every entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.parts.values import Array, Shape, Values, cell, check_q, on_device, reciprocal, values_from


@partial(jax.tree_util.register_dataclass, data_fields=["values", "q"], meta_fields=["shape"])
@dataclass(frozen=True)
class Dense:
    """`values / q` for every entry, as often used for norms and biases.

    Attributes:
      values: [shape].
      q: divisor, a scalar.
    """

    kind: ClassVar[str] = "dense"
    values: Values
    q: Array
    shape: Shape

    def to_dense(self) -> jax.Array:
        """float32 [shape]."""
        part, size = on_device(self), int(np.prod(self.shape, dtype=np.int64))
        index = jnp.arange(size, dtype=jnp.int32).reshape(self.shape)
        return part.values.read(None, *cell(index, self.shape)) * reciprocal(part.q)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ dense.T`, [..., in] -> [..., out]."""
        return jnp.einsum("...D,OD->...O", x, self.to_dense())

    def chunks(self, length: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Per chunk of `length` entries: all of them, float32."""
        part, size = jax.tree.map(np.asarray, self), int(np.prod(self.shape, dtype=np.int64))
        flat = Values(part.values.numbers.reshape(-1), part.values.scales, part.values.bits, part.values.per)
        for start in range(0, size, length):
            places = np.arange(start, min(start + length, size))
            yield slice(None), flat.read(places, *cell(places, self.shape)) * reciprocal(part.q)

    def fields(self) -> dict[str, Any]:
        return {"q": float(self.q), "values": self.values.fields()}

    def arrays(self) -> dict[str, np.ndarray]:
        return self.values.arrays()

    @classmethod
    def read(cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: Shape) -> Dense:
        """Raises: DarexError unless these are values of this shape."""
        width, size = shape[-1] if shape else 1, int(np.prod(shape, dtype=np.int64))
        values = values_from(fields.get("values") or {}, arrays, shape, size // width if width else 0, width)
        return cls(values, np.asarray(check_q(fields.get("q"))), shape)
