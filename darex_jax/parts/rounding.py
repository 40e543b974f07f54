"""Quantises the values of parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.parts.total import Parts, values_of
from darex_jax.parts.values import Values, quantise


def rounded(parts: Parts, bits: int | None, dtype: Any = jnp.bfloat16) -> Parts:
    """Quantises a sum of parts, with one scale per part and, for factors, one per rank.

    Args: bits: 8, 4, 2 or 1; None casts to `dtype`. dtype: of floats and of scales.
    """
    return parts.map(partial(rounded_part, bits=bits, dtype=dtype))


def rounded_part(part: Any, bits: int | None, dtype: Any = jnp.bfloat16) -> Any:
    """`rounded` of one part."""
    fields = {name: _rounded(name, values.numbers, bits, dtype) for name, values in values_of(part).items()}
    return replace(part, **fields)


def _rounded(name: str, numbers: Any, bits: int | None, dtype: Any) -> Values:
    if name == "a":
        columns = np.arange(numbers.shape[1])[None]
        return quantise(numbers, bits, "column", columns=columns, shape=numbers.shape, dtype=dtype)
    if name == "b":
        rows = np.arange(len(numbers))[:, None]
        return quantise(numbers, bits, "row", rows=rows, shape=numbers.shape, dtype=dtype)
    return quantise(numbers, bits, "matrix", dtype=dtype)
