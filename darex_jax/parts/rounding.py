"""Parts whose values are floats, with values in few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.parts.total import Part, Parts
from darex_jax.parts.values import Values, quantise

FIELDS = {  # which of a part's fields are `Values`; of a part of signs none is
    "random": ("values",),
    "sparse": ("values",),
    "columns": ("values",),
    "dense": ("values",),
    "low_rank": ("a", "b"),
    "sign": (),
}


def rounded(parts: Parts, bits: int | None, dtype: Any = jnp.bfloat16) -> Parts:
    """The same sum in few bits, with one scale for each part and for each rank of a factor.

    Args: bits: 8, 4, 2 or 1; None rounds floats to `dtype`. dtype: of floats and of scales.
    """

    def of(part: Part) -> Part:
        found: Any = {name: _rounded(name, getattr(part, name), bits, dtype) for name in FIELDS[part.kind]}
        return replace(part, **found)

    return Parts(tuple(map(of, parts.parts)), parts.shape)


def _rounded(name: str, values: Values, bits: int | None, dtype: Any) -> Values:
    numbers = values.numbers
    if name == "a":
        columns = np.arange(numbers.shape[1])[None]
        return quantise(numbers, bits, "column", columns=columns, shape=numbers.shape, dtype=dtype)
    if name == "b":
        rows = np.arange(len(numbers))[:, None]
        return quantise(numbers, bits, "row", rows=rows, shape=numbers.shape, dtype=dtype)
    return quantise(numbers, bits, "matrix", dtype=dtype)
