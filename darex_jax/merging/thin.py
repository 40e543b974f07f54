"""Sparsifying one delta before a merge; each function returns a tree like `delta`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from darex_jax.core.delta import drop, prune
from darex_jax.core.divisor import resolve_q
from darex_jax.core.errors import DarexError
from darex_jax.core.importance import magnitude_mask
from darex_jax.core.threefry import keep_threshold
from darex_jax.core.tree import PyTree, as_array, flatten_names, leaf_keys, map_named, working_dtype

OUTLIERS = 0.01  # share of a leaf's entries
WINDOW = 0.2  # difference of the drop rates of a row's smallest and largest entry


def whole(delta: PyTree) -> PyTree:
    """The whole delta: task arithmetic, arXiv:2212.04089."""
    return delta


def largest(delta: PyTree, *, drop_rate: float) -> PyTree:
    """The `1 - p` largest entries of each leaf, not rescaled, as TIES (arXiv:2306.01708) does over the whole
    model at once."""
    return drop(magnitude_mask(delta, drop_rate), delta)


def random(delta: PyTree, *, key: jax.Array, drop_rate: float, q: Any = None) -> PyTree:
    """`core.delta.prune`: DARE, or DAREx with a q."""
    return prune(key, delta, drop_rate, q)


def middle(delta: PyTree, *, drop_rate: float, outliers: float | None = None) -> PyTree:
    """Drops the largest and the smallest entries of each leaf, a share `p` in all; not rescaled.

    Args: outliers: the share of entries dropped at the upper end, at most `drop_rate`; None is 0.01, or
      `drop_rate` if that is smaller.
    Source: Model Breadcrumbs, arXiv:2312.06795, where the two shares are gamma and beta.
    """
    keep_threshold(drop_rate)
    outliers = min(OUTLIERS, drop_rate) if outliers is None else outliers
    if not 0.0 <= outliers <= drop_rate:
        raise DarexError(f"outliers must lie between 0 and the drop rate, {drop_rate}; got {outliers}.")
    kept = magnitude_mask(delta, drop_rate - outliers)
    above = magnitude_mask(delta, 1.0 - outliers) if outliers else jax.tree.map(jnp.zeros_like, kept)
    return drop(jax.tree.map(lambda low, high: low & ~high, kept, above), delta)


def ranked(
    delta: PyTree, *, key: jax.Array, drop_rate: float, window: float | None = None, q: Any = None
) -> PyTree:
    """Random survivors whose drop rate falls with magnitude rank in the row, each divided by its own density.

    The rates are linear in the rank, from `p + window / 2` for a row's smallest magnitude to `p - window / 2`
    for its largest; vectors are one row. Ties rank the first lower.

    Args:
      window: None is 0.2, or the largest that keeps all rates in [0, 1).
      q: divides the survivors instead, one number or one by name.
    Raises: ValueError if a rate would leave [0, 1), or for a q that is not positive.
    Source: MagPrune of DELLA, arXiv:2406.11617.
    """
    keep_threshold(drop_rate)
    span = min(WINDOW, 2 * drop_rate, 1 - drop_rate) if window is None else window
    if not (span >= 0.0 and drop_rate - span / 2 >= 0.0 and drop_rate + span / 2 < 1.0):
        raise DarexError(f"drop rates of {drop_rate} -+ {span / 2} leave [0, 1): choose a smaller window.")
    names = list(flatten_names(delta))
    by_name = {} if q is None else resolve_q(q, drop_rate, names)
    keys = leaf_keys(key, names)

    def of(name: str, leaf: Any) -> jax.Array:
        array = as_array(name, leaf)
        if not array.size:
            return array
        numbers = array.astype(working_dtype(array.dtype))
        rows = numbers.reshape(-1, array.shape[-1] if array.ndim > 1 else array.size)
        order = jnp.argsort(jnp.abs(rows), axis=-1, stable=True)
        ranks = jnp.argsort(order, axis=-1)
        # The densities by rank come from the host: XLA may fuse a product and a sum, and so move a threshold.
        step = np.float32(span / max(1, rows.shape[1] - 1))
        rates = np.float32(drop_rate + span / 2) - np.arange(rows.shape[1], dtype=np.float32) * step
        density = np.float32(1) - rates
        with jax.threefry_partitionable(True):
            bits = jax.random.bits(keys[name], array.shape, jnp.uint32).reshape(rows.shape)
        kept = (bits >> 8) < jnp.asarray(np.ceil(density * np.float32(2**24)).astype(np.uint32))[ranks]
        if q is None:
            scale = jnp.asarray(np.float32(1) / density)[ranks]
        else:
            scale = lax.stop_gradient(1.0 / jnp.asarray(by_name[name], np.float32))
        scaled = rows * scale.astype(rows.dtype)
        return jnp.where(kept, scaled, 0.0).reshape(array.shape).astype(array.dtype)

    return map_named(of, delta)
