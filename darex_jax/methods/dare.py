"""DARE and DAREx-q: a random mask, recomputed instead of stored, and a divisor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.divisor import resolve_q
from darex_jax.core.mask import survivor_indices
from darex_jax.core.threefry import keep_threshold
from darex_jax.core.tree import PyTree, check_floating, flatten_names, leaf_keys, map_named
from darex_jax.methods.budget import RAW_BITS, Budget
from darex_jax.parts.random import Random
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values, cell, quantise

ROW_VALUES = 32  # mean survivors per row from which on each row has its own scale


def dare(
    delta: PyTree,
    budget: Budget,
    evidence: Any = None,
    *,
    key: jax.Array,
    q: float | Mapping[str, float] | None = None,
    bits: int | None = None,
    dtype: Any = None,
) -> PyTree:
    """Keeps the survivors of the key's random mask.

    Args:
      delta: tree of floating arrays.
      budget: bytes pay for values only, since no indices are stored.
      key: scalar typed Threefry key.
      q: divisor, one for all or by name (names of other parameters are ignored); None is 1 - drop rate, which
        is DARE.
      bits: 8, 4, 2 or 1 per value, with least-squares scales, per row if rows have many survivors; None keeps
        floats.
      dtype: dtype of floats; None keeps each leaf's.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Raises: DarexError for a q that is missing for a parameter, or not a positive float32 number.
    Source: DARE, arXiv:2311.03099; DAREx, arXiv:2410.09344; quantised survivors: arXiv:2504.13237.
    """
    check_floating(delta)
    names = flatten_names(delta)
    drop_rate = budget.drop_rate
    if drop_rate is None:
        drop_rate = 1.0 - budget.density(value_bits(delta, bits, dtype), places=False)
    by_name = flatten_names(q) if isinstance(q, Mapping) else q
    divisors = resolve_q(by_name, drop_rate, list(names), by_name if isinstance(by_name, Mapping) else ())
    keys = {name: jax.random.key_data(k) for name, k in leaf_keys(key, names).items()}

    def prune_leaf(name: str, leaf: Any) -> Parts:
        flat, shape = np.asarray(leaf).reshape(-1), tuple(np.shape(leaf))
        own_key = np.asarray(keys[name])
        places = survivor_indices(own_key, flat.size, keep_threshold(drop_rate))
        values = survivors_values(flat, places, shape, bits, dtype)
        return Parts(
            (Random(values, own_key, np.asarray(np.float32(divisors[name])), drop_rate, shape),), shape
        )

    return map_named(prune_leaf, delta)


def value_bits(delta: PyTree, bits: int | None, dtype: Any) -> float:
    """Bits per stored value: `bits`, those of `dtype`, or on average of the leaves' own dtypes."""
    if bits is not None or dtype is not None:
        return bits or 8 * np.dtype(dtype).itemsize
    sizes = [
        (int(np.size(leaf)), np.dtype(getattr(leaf, "dtype", None) or jnp.result_type(leaf)).itemsize)
        for leaf in flatten_names(delta).values()
    ]
    entries = sum(size for size, _ in sizes)
    return 8 * sum(size * width for size, width in sizes) / entries if entries else RAW_BITS


def survivors_values(
    flat: np.ndarray, places: np.ndarray, shape: tuple[int, ...], bits: int | None, dtype: Any
) -> Values:
    """The values at increasing indices `places` of a flat parameter, as floats or quantised."""
    kept = flat[places.astype(np.int64)]
    if bits is None:
        return Values(kept if dtype is None else kept.astype(dtype))
    rows, _ = cell(places.astype(np.int64), shape)
    by_row = len(shape) == 2 and len(kept) >= ROW_VALUES * shape[0]
    matrix = (shape[0], shape[1]) if len(shape) == 2 else (1, flat.size)
    return quantise(kept, bits, "row" if by_row else "matrix", rows=rows, shape=matrix)
