"""Quantises the values of parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.parts.total import Parts, values_of
from darex_jax.parts.values import Values, quantise

# Least scale of a rank's values in 4 bits, in their root mean squares, if coarse.
COARSE = 0.7


def rounded(parts: Parts, bits: int | None, dtype: Any = jnp.bfloat16, *, coarse: bool = False) -> Parts:
    """Quantises a sum of parts, with one scale per part and, for factors, one per rank.

    Args:
      bits: 8, 4, 2 or 1; None casts to `dtype`.
      dtype: of floats and of scales.
      coarse: factors in 4 bits have larger scales than those of least squares. An entropy-coded value then
        takes 2.5 bits instead of 3.4, and at equal bytes more ranks, each less exact, are a better delta.
    """
    return parts.map(partial(rounded_part, bits=bits, dtype=dtype, coarse=coarse))


def rounded_part(part: Any, bits: int | None, dtype: Any = jnp.bfloat16, *, coarse: bool = False) -> Any:
    """`rounded` of one part."""
    least = COARSE if coarse and bits == 4 else 0.0
    fields = {name: _rounded(name, v.numbers, bits, dtype, least) for name, v in values_of(part).items()}
    return replace(part, **fields)


def _rounded(name: str, numbers: Any, bits: int | None, dtype: Any, least: float) -> Values:
    if name == "a":
        columns = np.arange(numbers.shape[1])[None]
        return quantise(
            numbers, bits, "column", columns=columns, shape=numbers.shape, dtype=dtype, least=least
        )
    if name == "b":
        rows = np.arange(len(numbers))[:, None]
        return quantise(numbers, bits, "row", rows=rows, shape=numbers.shape, dtype=dtype, least=least)
    return quantise(numbers, bits, "matrix", dtype=dtype)
