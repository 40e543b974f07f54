"""Structural pruning: a random subset of each matrix's input features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.divisor import resolve_q
from darex_jax.core.errors import DarexError
from darex_jax.core.importance import structured_mask
from darex_jax.core.tree import PyTree, flatten_names, map_named
from darex_jax.methods.budget import Budget, TooSmall
from darex_jax.methods.dare import value_bits
from darex_jax.methods.vectors import vector_parts
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
      q: one number; None is the share of columns kept.
      bits, dtype: of values; scales per row.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Raises: DarexError for a q that is not a positive float32 number; TooSmall if vectors leave no room.
    Source: structural pruning of DAREx, arXiv:2410.09344.
    """
    if isinstance(q, Mapping):
        raise DarexError("structured divides all columns by one q, not by one for each parameter.")
    small, room = vector_parts(delta, budget, value_bits(delta, bits, dtype))
    leaves = {name: leaf for name, leaf in flatten_names(delta).items() if name not in small}
    resolve_q(q, 0.0, list(leaves))
    density = min(1.0, room / max(1, sum(int(np.size(leaf)) for leaf in leaves.values())))
    if leaves and density <= 0.0:
        raise TooSmall("the vectors take the whole budget: allow more, or leave them out of the scope.")
    masks = structured_mask(key, leaves, 1.0 - density) if leaves else {}

    def prune_leaf(name: str, leaf: Any) -> Parts:
        if name in small:
            return small[name]
        mask = masks[name]
        shape = tuple(np.shape(leaf))
        columns = np.flatnonzero(np.asarray(mask)[0]).astype(np.uint32)
        kept = np.asarray(leaf)[:, columns]
        values = quantise(kept, bits, "row", rows=np.arange(shape[0])[:, None], shape=shape, dtype=dtype)
        divisor = len(columns) / shape[1] if q is None else q
        return Parts((Columns(values, columns, np.asarray(np.float32(divisor)), shape),), shape)

    return map_named(prune_leaf, delta)
