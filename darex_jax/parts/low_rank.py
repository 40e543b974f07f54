"""A low-rank part: the product of two thin factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.parts.values import Array, Shape, Values, check_q, on_device, reciprocal, values_from


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "q"], meta_fields=["shape"])
@dataclass(frozen=True)
class LowRank:
    """`A @ B / q`.

    Attributes:
      a: [out, r], scales per row or per its r columns; b: [r, in], scales per its r rows or per column.
      q: divisor, a scalar.
      shape: of the parameter, [out, in].
    """

    kind: ClassVar[str] = "low_rank"
    a: Values
    b: Values
    q: Array
    shape: Shape

    @property
    def rank(self) -> int:
        return int(np.shape(self.b.numbers)[0])

    def to_dense(self) -> jax.Array:
        """float32 [out, in]; equal within rounding to `chunks`, which sums in float64."""
        part = on_device(self)
        a, b = part.factors()
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return product * reciprocal(part.q)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ dense.T`, [..., in] -> [..., out]: two thin products."""
        part = on_device(self)
        a, b = part.factors()
        return jnp.einsum("...D,RD,OR->...O", x, b, a) * reciprocal(part.q)

    def factors(self) -> tuple[Array, Array]:
        """A [out, r] and B [r, in], float32."""
        rank = np.arange(self.rank)
        a = self.a.read(None, np.arange(self.shape[0])[:, None], rank[None])
        return a, self.b.read(None, rank[:, None], np.arange(self.shape[1])[None])

    def chunks(self, length: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Per chunk of `length` entries: all of them, float32.

        Each is a sum in float64 of products of float32 numbers, rounded once. For factors in bfloat16 or
        integers these sums are exact unless magnitudes are far apart, so the bits do not depend on the order.
        """
        out, width = self.shape
        if not self.rank:  # no number is stored, so that a shape of any size costs nothing
            for start in range(0, out * width, length):
                yield slice(None), np.zeros(min(length, out * width - start), np.float32)
            return
        part = jax.tree.map(np.asarray, self)
        a, b = (factor.astype(np.float64) for factor in part.factors())
        scale = reciprocal(part.q)
        for start in range(0, out * width, length):
            stop = min(start + length, out * width)
            first, last = start // width, -(-stop // width)
            rows = (a[first:last] @ b).astype(np.float32).reshape(-1)
            yield slice(None), rows[start - first * width : stop - first * width] * scale

    def fields(self) -> dict[str, Any]:
        return {"q": float(self.q), "rank": self.rank, "a": self.a.fields(), "b": self.b.fields()}

    def arrays(self) -> dict[str, np.ndarray]:
        factors = {"a": self.a, "b": self.b}
        return {f"{f}.{name}": x for f, values in factors.items() for name, x in values.arrays().items()}

    @classmethod
    def read(cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: Shape) -> LowRank:
        """Raises: DarexError unless these are factors of a parameter of this shape."""
        rank = fields.get("rank")
        if len(shape) != 2 or type(rank) is not int or not 0 <= rank <= min(shape):
            raise DarexError("the rank is not an integer between 0 and the smaller side of the matrix")
        pairs = {"a": (shape[0], rank), "b": (rank, shape[1])}
        a, b = (
            values_from(
                fields.get(f) or {},
                {name.removeprefix(f"{f}."): x for name, x in arrays.items() if name.startswith(f"{f}.")},
                pair,
                *pair,
            )
            for f, pair in pairs.items()
        )
        return cls(a, b, np.asarray(check_q(fields.get("q"))), shape)
