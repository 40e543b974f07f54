"""Magnitude pruning: the largest entries of each parameter."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.core.importance import kept_count
from darex_jax.core.tree import PyTree, check_floating, map_named
from darex_jax.methods.budget import Budget
from darex_jax.methods.dare import survivors_values, value_bits
from darex_jax.parts.sparse import Sparse
from darex_jax.parts.total import Parts


def magnitude(
    delta: PyTree, budget: Budget, evidence: Any = None, *, bits: int | None = None, dtype: Any = jnp.bfloat16
) -> PyTree:
    """The `1 - p` largest `|delta|` of each parameter; no rescaling. Ties keep the first.

    Args:
      delta: tree of floating arrays.
      budget: bytes pay for values and their indices.
      bits, dtype: of values, as in `dare`.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Source: the baseline MP of DAREx, arXiv:2410.09344.
    """
    check_floating(delta)
    density = budget.density(value_bits(delta, bits, dtype), places=True)

    def prune_leaf(name: str, leaf: Any) -> Parts:
        flat = np.asarray(leaf)
        return kept_parts(flat, largest(flat, kept_count(1.0 - density, flat.size)), bits, dtype)

    return map_named(prune_leaf, delta)


def largest(leaf: np.ndarray, count: int) -> np.ndarray:
    """`magnitude_mask` of one leaf on the host, in a quarter of the memory, with the same tie-breaking."""
    unsigned = np.dtype(f"u{leaf.dtype.itemsize}")
    scores = np.abs(leaf).reshape(-1).view(unsigned)  # non-negative floats are ordered as their bits are
    kept = np.zeros(leaf.size, bool)
    if count:
        least = np.partition(scores, leaf.size - count)[leaf.size - count]
        kept[scores > least] = True
        kept[np.flatnonzero(scores == least)[: count - np.count_nonzero(kept)]] = True
    return kept.reshape(leaf.shape)


def kept_parts(leaf: Any, mask: Any, bits: int | None, dtype: Any) -> Parts:
    """The kept entries of a leaf as a sparse part, q = 1."""
    flat, shape = np.asarray(leaf).reshape(-1), tuple(np.shape(leaf))
    places = np.flatnonzero(np.asarray(mask)).astype(np.uint32 if flat.size < 2**32 else np.uint64)
    values = survivors_values(flat, places, shape, bits, dtype)
    return Parts((Sparse(values, places, np.asarray(np.float32(1)), shape),), shape)
