"""Masks other than the elementwise random one: by magnitude, by WANDA score, by whole input features."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from darex_jax.core.errors import DarexError
from darex_jax.core.sharding import sharded_like
from darex_jax.core.threefry import keep_threshold
from darex_jax.core.tree import (
    PyTree,
    flatten_names,
    floating,
    leaf_keys,
    map_named,
    shape_of,
    working_dtype,
)


def magnitude_mask(delta: PyTree, drop_rate: float) -> PyTree:
    """True for the `round((1 - drop_rate) * size)` entries of each leaf that are largest in magnitude.

    Args: delta: tree of floating arrays; drop_rate: Python float in [0, 1).
    Returns: a tree of bool arrays of the same shapes. Ties keep the first in index order.
    Raises: ValueError for a drop_rate out of range.
    Source: the magnitude pruning baseline of DAREx (arXiv:2410.09344): no rescaling, q = 1.
    """
    keep_threshold(drop_rate)

    def leaf_mask(name: str, leaf: Any) -> jax.Array:
        scores = _magnitudes(name, leaf)
        return sharded_like(scores, partial(_largest_of_all, drop_rate=drop_rate))

    return map_named(leaf_mask, delta)


def wanda_mask(
    delta: PyTree, input_norms: PyTree, drop_rate: float, group: Literal["row", "matrix"] = "row"
) -> PyTree:
    """True for the entries with the largest `|delta[i, j]| * ||x_j||`, compared within an output row.

    Args:
      delta: tree of floating arrays, matrices as [out, in].
      input_norms: the L2 norms [in] of each input feature over calibration tokens, a tree or a dict by name;
        a leaf without norms (a bias, say) is compared by magnitude over the whole leaf.
      drop_rate: Python float in [0, 1); `round((1 - drop_rate) * n)` of n entries are kept.
      group: entries are ranked within a "row", as in WANDA, or within the whole "matrix".
    Returns: a tree of bool arrays. Ties keep the first in index order.
    Raises: ValueError for a drop_rate out of range, or norms that match no leaf.
    Source: WANDA, arXiv:2306.11695, applied to deltas as in DAREx (arXiv:2410.09344): no rescaling, q = 1.
    """
    keep_threshold(drop_rate)
    if group not in ("row", "matrix"):
        raise DarexError(f"group is 'row' or 'matrix', got {group!r}.")
    norms = flatten_names(input_norms)
    shapes = {name: shape_of(name, leaf) for name, leaf in flatten_names(delta).items()}
    for name, norm in norms.items():
        if name not in shapes:
            raise DarexError(f"input_norms has '{name}', which is not in the delta.")
        if len(shapes[name]) != 2 or jnp.shape(norm) != shapes[name][1:]:
            raise DarexError(
                f"input_norms of '{name}' has shape {list(jnp.shape(norm))}; a weight of shape "
                f"{list(shapes[name])} needs one norm per input feature."
            )

    def leaf_mask(name: str, leaf: Any) -> jax.Array:
        scores = _magnitudes(name, leaf)
        if name in norms:
            scores = scores * jnp.broadcast_to(jnp.asarray(norms[name], scores.dtype), scores.shape)
        if name not in norms or group == "matrix":
            return sharded_like(scores, partial(_largest_of_all, drop_rate=drop_rate))
        return sharded_like(scores, partial(_largest, count=kept_count(drop_rate, scores.shape[-1])))

    return map_named(leaf_mask, delta)


def structured_mask(key: jax.Array, tree: PyTree, drop_rate: float) -> PyTree:
    """True for whole input features: one random subset of the last axis of each leaf.

    Args:
      key: scalar typed Threefry key; a leaf's subset depends on it and the leaf's name.
      tree: arrays or `jax.ShapeDtypeStruct`s, matrices as [out, in].
      drop_rate: Python float in [0, 1); `round((1 - drop_rate) * n)` of n features survive, at least one.
    Returns: a tree of bool arrays of the leaves' shapes; a vector's entries are its features.
    Raises: ValueError for a drop_rate out of range, TypeError for a key of another type.
    Source: structural pruning of DAREx, arXiv:2410.09344; survivors are divided by q as in DAREx-q.
    """
    keep_threshold(drop_rate)
    keys = leaf_keys(key, flatten_names(tree))

    def leaf_mask(name: str, leaf: Any) -> jax.Array:
        shape = shape_of(name, leaf)
        features = shape[-1] if shape else 1
        with jax.threefry_partitionable(True):
            bits = jax.random.bits(keys[name], (features,), jnp.uint32)
        keep = _largest_bits(bits, np.uint32(max(1, kept_count(drop_rate, features))))
        return jnp.broadcast_to(keep if shape else keep[0], shape)

    return map_named(leaf_mask, tree)


def kept_count(drop_rate: float, size: int) -> int:
    """How many of `size` entries are kept at this drop rate."""
    return round((1.0 - float(drop_rate)) * size)


def _magnitudes(name: str, leaf: Any) -> jax.Array:
    array = floating(name, leaf)
    return jnp.abs(array.astype(working_dtype(array.dtype)))


def _largest_of_all(scores: jax.Array, drop_rate: float) -> jax.Array:
    return _largest(scores.reshape(-1), kept_count(drop_rate, scores.size)).reshape(scores.shape)


def _largest(scores: jax.Array, count: int) -> jax.Array:
    """The mask of the `count` largest of non-negative `scores` along the last axis; float32 or float64."""
    bits = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    return _largest_bits(lax.bitcast_convert_type(lax.stop_gradient(scores), bits), np.uint32(count))


@jax.jit
def _largest_bits(scores: jax.Array, count: Any) -> jax.Array:
    """The mask of the `count` largest unsigned integers along the last axis; ties keep the first.

    Non-negative floats are ordered as their bits are, so the smallest score kept is found bit by bit:
    one counting pass per bit, where a sort would be far slower and need a copy.

    Args: count: uint32, a traced argument, so that another count does not recompile.
    """
    dtype, width = scores.dtype, 8 * scores.dtype.itemsize

    def settle_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        trial = least | (jnp.ones((), dtype) << (width - 1 - i).astype(dtype))
        enough = jnp.sum(scores >= trial, axis=-1, keepdims=True, dtype=jnp.uint32) >= count
        return jnp.where(enough, trial, least)

    # Zeros that vary over devices as the scores do, as a loop within shard_map requires.
    least = lax.fori_loop(0, width, settle_bit, scores[..., :1] & jnp.zeros((), dtype))
    above, equal = scores > least, scores == least
    room = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.uint32)
    return above | (
        equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.uint32) <= jnp.broadcast_to(room, scores.shape))
    )
