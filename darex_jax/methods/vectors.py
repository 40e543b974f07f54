"""How methods for matrices treat all other leaves: norms, biases."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.core.tree import PyTree, flatten_names
from darex_jax.methods.budget import RAW_BITS, WHOLE, Budget
from darex_jax.methods.magnitude import magnitude
from darex_jax.parts.dense import Dense
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values


def is_matrix(leaf: Any) -> bool:
    return np.ndim(leaf) == 2


def vector_parts(delta: PyTree, budget: Budget) -> dict[str, Parts]:
    """Parts for every leaf that is not a matrix, by name.

    Whole in bfloat16 if together they take at most a tenth of the budget, else the largest entries of each.
    """
    leaves = flatten_names(delta)
    vectors = {name: leaf for name, leaf in leaves.items() if not is_matrix(leaf)}
    entries = sum(int(np.size(leaf)) for leaf in leaves.values())
    if sum(int(np.size(leaf)) for leaf in vectors.values()) > WHOLE * budget.numbers(entries, RAW_BITS):
        return magnitude(vectors, budget) if vectors else {}
    return {name: whole(leaf, jnp.bfloat16) for name, leaf in vectors.items()}


def whole(leaf: Any, dtype: Any) -> Parts:
    """A parameter with all its values, rounded to `dtype`."""
    shape = tuple(np.shape(leaf))
    return Parts((Dense(Values(jnp.asarray(leaf, dtype)), np.asarray(np.float32(1)), shape),), shape)


def numbers_stored(parts: Parts) -> int:
    """How many numbers a sum of parts stores, indices and scales included."""
    return sum(int(np.size(x)) for part in parts.parts for x in part.arrays().values())
