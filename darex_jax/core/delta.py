"""Delta algebra: subtract, drop, rescale, add back. Pure functions on PyTrees, all of them jit-able.

Arithmetic is float32; `apply_delta` rounds once, to the base's dtype.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from darex_jax.core.errors import DarexError
from darex_jax.core.mask import compiler_options, survivors, traced_threshold
from darex_jax.core.tree import PyTree, flatten_names, leaf_keys, map_named

Q = float | jax.Array | Mapping[str, Any] | None


def compute_delta(fine: PyTree, base: PyTree) -> PyTree:
    """`fine - base` in float32, leaf by leaf; zero for integer leaves, which are never touched.

    Args: fine, base: trees with the same names and shapes, any floating dtypes.
    Raises: ValueError naming every leaf that is in one tree only or has another shape.
    """
    _check_same(fine, base, "fine", "base")

    def subtract(f: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.asarray(f).dtype, jnp.floating):
            return jnp.zeros(jnp.shape(f), jnp.float32)
        return jnp.asarray(f, jnp.float32) - jnp.asarray(b, jnp.float32)

    return jax.tree.map(subtract, fine, base)


def apply_delta(base: PyTree, delta: PyTree) -> PyTree:
    """`base + delta` in float32, rounded once to the base's dtypes.

    Where the delta is zero the base's own bits stay (also a -0.0). So do integer leaves, and leaves that
    the delta does not have.

    Raises: ValueError naming every leaf that is in the delta only or has another shape.
    """
    deltas = flatten_names(delta)
    in_delta = {name: leaf for name, leaf in flatten_names(base).items() if name in deltas}
    _check_same(in_delta, deltas, "base", "delta")

    def add(name: str, b: jax.Array) -> jax.Array:
        b = jnp.asarray(b)
        if name not in deltas or not jnp.issubdtype(b.dtype, jnp.floating):
            return b
        d = deltas[name]
        total = (b.astype(jnp.float32) + jnp.asarray(d, jnp.float32)).astype(b.dtype)
        return jnp.where(d == 0, b, total)

    return map_named(add, base)


def drop(mask: PyTree, delta: PyTree) -> PyTree:
    """`delta` where `mask` is True, zero elsewhere. Shapes and dtypes of `delta`."""
    return jax.tree.map(lambda m, d: jnp.where(m, d, jnp.zeros((), d.dtype)), mask, delta)


def rescale(delta: PyTree, q: Q) -> PyTree:
    """`delta / q`, q a number or one per leaf (a tree, or a dict by name). Shapes and dtypes of `delta`.

    A q is read as a float32 and entries are multiplied by its float32 reciprocal: the one rounding that
    every platform does alike. Raises: ValueError for a q that is not positive or names that do not match.
    """
    scales = _scale_of(q, delta)
    # Every entry is kept, but through the same select: see `_drop_and_rescale`.
    return map_named(lambda name, d: _drop_and_rescale(d != 0, d, scales[name]), delta)


def prune(key: jax.Array, delta: PyTree, drop_rate: float, q: Q = None, *, donate: bool = False) -> PyTree:
    """Drops entries of `delta` at random and divides the survivors by q.

    Args:
      key: scalar typed Threefry key; the mask of a leaf depends on it and on the leaf's name alone.
      delta: tree of floating arrays, any shapes.
      drop_rate: probability that an entry is dropped, a Python float in [0, 1).
      q: divisor of the survivors, a number or one per leaf (a tree, or a dict by name); it may be traced.
        None is 1 - drop_rate, which keeps the mean (DARE).
      donate: give the delta's buffers to the result, which spares a copy of the model; the delta is
        unusable afterwards. Ignored under jit, where `jax.jit(..., donate_argnums=...)` says it.
    Returns: a tree like `delta`: same names, shapes, dtypes and shardings.
    Raises: ValueError for a drop_rate or q out of range; TypeError for another kind of key.
    Source: DARE, arXiv:2311.03099; free q: DAREx, arXiv:2410.09344, section 3. Unlike the authors' code the
      rate and q are never rounded to the leaf's dtype.
    """
    keys = leaf_keys(key, flatten_names(delta))
    threshold = traced_threshold(drop_rate)
    scales = _scale_of(1.0 - drop_rate if q is None else q, delta)

    def prune_leaf(name: str, leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise DarexError(f"'{name}' holds {leaf.dtype}: only floating parameters are pruned.")
        own_key = keys[name]
        if isinstance(leaf, jax.core.Tracer) or isinstance(own_key, jax.core.Tracer):
            # Part of the caller's program, whose options count.
            return _prune(leaf, own_key, *threshold, scales[name])
        platform = next(iter(leaf.devices())).platform
        return _compiled_prune(platform, donate)(leaf, own_key, *threshold, scales[name])

    return map_named(prune_leaf, delta)


def _prune(
    leaf: jax.Array, key: jax.Array, below: ArrayLike, all_kept: ArrayLike, scale: ArrayLike
) -> jax.Array:
    return _drop_and_rescale(survivors(key, leaf.shape, below, all_kept), leaf, scale)


def _drop_and_rescale(keep: jax.Array, leaf: jax.Array, scale: ArrayLike) -> jax.Array:
    # The select comes after the product on purpose: it keeps a compiler from contracting the product and
    # a later `base + ...` into one fused multiply-add, which rounds differently from one program to the next.
    if leaf.dtype == jnp.bfloat16:
        # Rounded as integers: XLA's CPU backend vectorises this, its own conversion it does not.
        rounded = lax.reduce_precision(leaf.astype(jnp.float32) * scale, exponent_bits=8, mantissa_bits=7)
        bits = (lax.bitcast_convert_type(rounded, jnp.uint32) >> 16).astype(jnp.uint16)
        return lax.bitcast_convert_type(jnp.where(keep, bits, jnp.uint16(0)), jnp.bfloat16)
    scaled = (leaf.astype(jnp.float32) * scale).astype(leaf.dtype)
    return jnp.where(keep, scaled, jnp.zeros((), leaf.dtype))


@cache
def _compiled_prune(platform: str, donate: bool) -> Callable[..., jax.Array]:
    return jax.jit(_prune, donate_argnums=0 if donate else (), compiler_options=compiler_options(platform))


def _scale_of(q: Any, tree: PyTree) -> dict[str, Any]:
    """`{name: float32 1/q}` for every leaf of `tree`."""
    names = flatten_names(tree)
    if q is None:
        raise DarexError("q is missing; DARE is q = 1 - drop_rate.")
    by_name = flatten_names(q)
    if list(by_name) == [""]:  # a single number
        scale = _reciprocal(q)
        return dict.fromkeys(names, scale)
    missing, unknown = sorted(names.keys() - by_name.keys()), sorted(by_name.keys() - names.keys())
    if missing or unknown:
        raise DarexError(f"q by name does not fit the tree: no q for {missing}; no leaf for {unknown}.")
    return {name: _reciprocal(by_name[name]) for name in names}


@partial(jax.jit, inline=True)
def _traced_reciprocal(q: jax.Array) -> jax.Array:
    return jnp.float32(1.0) / q.astype(jnp.float32)


def _reciprocal(q: Any) -> Any:
    if isinstance(q, jax.Array):  # an array may be traced: it is not looked at
        return _traced_reciprocal(q)
    if not float(q) > 0.0:
        raise DarexError(f"q divides the survivors and must be positive, got {q}.")
    return np.float32(1.0) / np.float32(q)


def _check_same(left: PyTree, right: PyTree, left_word: str, right_word: str) -> None:
    left_shapes = {name: jnp.shape(leaf) for name, leaf in flatten_names(left).items()}
    right_shapes = {name: jnp.shape(leaf) for name, leaf in flatten_names(right).items()}
    faults = [f"'{name}' is only in {left_word}" for name in left_shapes if name not in right_shapes]
    faults += [f"'{name}' is only in {right_word}" for name in right_shapes if name not in left_shapes]
    faults += [
        f"'{name}' is {shape} in {left_word} and {right_shapes[name]} in {right_word}"
        for name, shape in left_shapes.items()
        if name in right_shapes and right_shapes[name] != shape
    ]
    if faults:
        raise DarexError("the trees do not match: " + "; ".join(faults) + ".")
