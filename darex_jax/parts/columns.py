"""A part that keeps whole input features: column indices and a dense matrix of those columns."""

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


@partial(jax.tree_util.register_dataclass, data_fields=["values", "columns", "q"], meta_fields=["shape"])
@dataclass(frozen=True)
class Columns:
    """`values / q` in some columns, zero in the others.

    Attributes:
      values: [out, K].
      columns: increasing column indices [K].
      q: divisor, a scalar.
      shape: of the parameter, [out, in].
    Source: structural pruning of DAREx, arXiv:2410.09344.
    """

    kind: ClassVar[str] = "columns"
    values: Values
    columns: Array
    q: Array
    shape: Shape

    def to_dense(self) -> jax.Array:
        """float32 [out, in]."""
        part = on_device(self)
        return jnp.zeros(self.shape, jnp.float32).at[:, part.columns].set(part.numbers(), unique_indices=True)

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ dense.T`, [..., in] -> [..., out]: a gather and a thin product."""
        part = on_device(self)
        return jnp.einsum("...K,OK->...O", x[..., part.columns], part.numbers())

    def numbers(self) -> Array:
        rows = np.arange(self.shape[0])[:, None]
        return self.values.read(None, rows, self.columns[None]) * reciprocal(self.q)

    def chunks(self, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Per chunk of `length` entries: the indices of the nonzero ones, and their float32 values."""
        part, (out, width) = jax.tree.map(np.asarray, self), self.shape
        numbers, columns = part.numbers().reshape(-1), part.columns.astype(np.int64)

        def before(flat: int) -> int:
            row, column = divmod(flat, width)
            return row * len(columns) + int(np.searchsorted(columns, column))

        for start in range(0, out * width, length):
            places = np.arange(before(start), before(min(start + length, out * width)))
            row, place = np.divmod(places, max(1, len(columns)))
            yield row * width + columns[place] - start, numbers[places]

    def fields(self) -> dict[str, Any]:
        return {"q": float(self.q), "values": self.values.fields()}

    def arrays(self) -> dict[str, np.ndarray]:
        return {"columns": np.asarray(self.columns), **self.values.arrays()}

    @classmethod
    def read(cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: Shape) -> Columns:
        """Raises: DarexError unless these are columns of a parameter of this shape."""
        columns = arrays.get("columns")
        if len(shape) != 2 or columns is None or columns.dtype.kind != "u":
            raise DarexError("columns are missing, or the parameter is not a matrix")
        if columns.size and (int(columns[-1]) >= shape[1] or not (columns[1:] > columns[:-1]).all()):
            raise DarexError("column indices are not increasing, or outside of the matrix")
        form = fields.get("values") or {}
        values = values_from(form, arrays, (shape[0], columns.size), *shape)
        return cls(values, columns, np.asarray(check_q(fields.get("q"))), shape)
