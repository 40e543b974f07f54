"""How methods for matrices treat all other leaves: norms, biases."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.core.tree import PyTree, check_floating, flatten_names
from darex_jax.methods.budget import RAW_BITS, WHOLE, Budget
from darex_jax.methods.magnitude import magnitude
from darex_jax.parts.dense import Dense
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values


def is_matrix(leaf: Any) -> bool:
    """Whether a leaf is pruned as a matrix: two axes, and not empty."""
    return np.ndim(leaf) == 2 and np.size(leaf) > 0


def vector_parts(delta: PyTree, budget: Budget, bits: float = RAW_BITS) -> tuple[dict[str, Parts], float]:
    """Parts for every leaf that is not a matrix, by name, and what is left of the budget's numbers of `bits`.

    Whole in bfloat16 if together they take at most a tenth of the budget, else the largest entries of each.
    Raises: DarexError for a leaf that is not floating.
    """
    check_floating(delta)
    leaves = flatten_names(delta)
    vectors = {name: leaf for name, leaf in leaves.items() if not is_matrix(leaf)}
    entries, own = (sum(int(np.size(leaf)) for leaf in some.values()) for some in (leaves, vectors))
    room = budget.numbers(entries, bits)
    if own > WHOLE * budget.numbers(entries, RAW_BITS):
        return magnitude(vectors, budget), room - budget.numbers(own, bits)
    spent = own if budget.bytes_per_parameter is None else own * RAW_BITS / bits
    return {name: whole(leaf, jnp.bfloat16) for name, leaf in vectors.items()}, room - spent


def whole(leaf: Any, dtype: Any) -> Parts:
    """A parameter with all its values, rounded to `dtype`."""
    shape = tuple(np.shape(leaf))
    return Parts((Dense(Values(jnp.asarray(leaf, dtype)), np.asarray(np.float32(1)), shape),), shape)
