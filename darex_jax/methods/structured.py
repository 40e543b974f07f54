"""Structural pruning: a random subset of each matrix's input features."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.importance import structured_mask
from darex_jax.core.tree import PyTree, flatten_names, map_named
from darex_jax.methods.budget import Budget
from darex_jax.methods.magnitude import value_bits
from darex_jax.methods.vectors import is_matrix, numbers_stored, vector_parts
from darex_jax.parts.columns import Columns
from darex_jax.parts.total import Parts
from darex_jax.parts.values import quantise


def structured(
    delta: PyTree,
    budget: Budget,
    evidence: Any = None,
    *,
    key: jax.Array,
    q: float | None = None,
    bits: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> PyTree:
    """Random columns of each matrix, divided by q; vectors as in `vector_parts`.

    Args:
      key: scalar typed Threefry key, see `structured_mask`.
      q: None is the share of columns kept.
      bits, dtype: of values; scales per row.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Source: structural pruning of DAREx, arXiv:2410.09344.
    """
    small = vector_parts(delta, budget)
    leaves = flatten_names(delta)
    matrices = sum(int(np.size(leaf)) for name, leaf in leaves.items() if name not in small)
    room = budget.numbers(sum(int(np.size(leaf)) for leaf in leaves.values()), value_bits(bits, dtype))
    room -= sum(numbers_stored(parts) for parts in small.values())
    density = min(1.0, max(0.0, room / max(1, matrices)))
    masks = structured_mask(key, delta, 1.0 - density)

    def prune_leaf(name: str, leaf: Any, mask: Any) -> Parts:
        if not is_matrix(leaf):
            return small[name]
        shape = tuple(np.shape(leaf))
        columns = np.flatnonzero(np.asarray(mask)[0]).astype(np.uint32)
        kept = np.asarray(leaf)[:, columns]
        values = quantise(kept, bits, "row", rows=np.arange(shape[0])[:, None], shape=shape, dtype=dtype)
        divisor = len(columns) / shape[1] if q is None else q
        return Parts((Columns(values, columns, np.asarray(np.float32(divisor)), shape),), shape)

    return map_named(prune_leaf, delta, masks)
