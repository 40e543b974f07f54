"""Delta algebra: subtract, drop, rescale, add back. Pure functions on PyTrees.

Trees are any PyTrees, nested dicts as well as modules; leaves of two trees are matched by name, and the
result has the structure of the first. Arithmetic is float32 (float64 for float64 leaves); `apply_delta`
rounds once, to the base's dtype. All functions work under jit, grad, vmap and shard_map; under vmap and
shard_map a leaf is the slice that the function gets: one example, one device's shard. Prune a sharded model
by calling `prune` on it directly, outside of shard_map: it is elementwise and needs no communication.
"""

from collections import Counter
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
from darex_jax.core.sharding import placed_like
from darex_jax.core.tree import (
    PyTree,
    as_array,
    dtype_of,
    flatten_names,
    floating,
    leaf_keys,
    map_named,
    shape_of,
    working_dtype,
)

Q = float | jax.Array | Mapping[str, Any] | None


def compute_delta(fine: PyTree, base: PyTree) -> PyTree:
    """`fine - base` in float32 (float64 if either is), leaf by leaf.

    Zero for leaves that are not floating in either, such as integers, which are never changed.

    Args: fine, base: trees with the same names and shapes, any floating dtypes.
    Returns: a tree like `fine`.
    Raises: ValueError naming every leaf that is in one tree only, differs in shape, or is not an array, and
      for leaves that are complex, or floating in one of the trees only.
    """
    bases = flatten_names(base)
    check_same(flatten_names(fine), bases, "fine", "base")

    def subtract(name: str, leaf: Any) -> jax.Array:
        f, b = as_array(name, leaf), as_array(name, bases[name])
        _check_real(name, f, b)
        kinds = [jnp.issubdtype(x.dtype, jnp.floating) for x in (f, b)]
        if kinds[0] != kinds[1]:
            raise DarexError(f"'{name}' is {f.dtype} in fine and {b.dtype} in base: one of them is floating.")
        if not kinds[0]:
            return jnp.zeros(f.shape, jnp.float32)
        dtype = working_dtype(f.dtype, b.dtype)
        return f.astype(dtype) - b.astype(dtype)

    return map_named(subtract, fine)


def apply_delta(base: PyTree, delta: PyTree) -> PyTree:
    """`base + delta` in float32 (float64 if either is), rounded once to the base's dtypes.

    Where the delta is zero the base's bits are kept (also a -0.0). Integer leaves and leaves that are not in
    the delta, arrays or not, are returned unchanged.

    Args: delta: arrays or parts (`darex_jax.parts`) under the base's leaf names.
    Returns: a tree like `base`.
    Raises: ValueError naming every leaf that is in the delta only or differs in shape, and for a complex one.
    """
    deltas = flatten_names(delta)
    in_delta = {name: leaf for name, leaf in flatten_names(base).items() if name in deltas}
    check_same(in_delta, deltas, "base", "delta")

    def add(name: str, leaf: Any) -> Any:
        if name not in deltas:
            return leaf
        b, d = as_array(name, leaf), as_array(name, deltas[name])
        _check_real(name, b, d)
        if not jnp.issubdtype(b.dtype, jnp.floating):
            return b
        return _add(b, placed_like(d, b))

    return map_named(add, base)


def _check_real(name: str, *arrays: jax.Array) -> None:
    if any(jnp.issubdtype(array.dtype, jnp.complexfloating) for array in arrays):
        raise DarexError(f"'{name}' is complex: take deltas of its real and imaginary parts.")


@jax.custom_jvp
def _changed(b: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.where(d == 0, b, _sum(b, d))


@_changed.defjvp
def _changed_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    # The select keeps the base's bits where the delta is zero; the derivative there is still 1.
    return _changed(*primals), _sum(*tangents)


_add = jax.jit(_changed, inline=True)


def _sum(b: jax.Array, d: jax.Array) -> jax.Array:
    dtype = working_dtype(b.dtype, d.dtype)
    return (b.astype(dtype) + d.astype(dtype)).astype(b.dtype)


def drop(mask: PyTree, delta: PyTree) -> PyTree:
    """`delta` where `mask` is True, zero elsewhere. A tree like `delta`: same shapes and dtypes.

    Raises: ValueError naming every leaf that is in one tree only or has another shape.
    """
    masks = flatten_names(mask)
    check_same(masks, flatten_names(delta), "mask", "delta")

    def drop_leaf(name: str, leaf: Any) -> jax.Array:
        d = as_array(name, leaf)
        return jnp.where(masks[name], d, jnp.zeros((), d.dtype))

    return map_named(drop_leaf, delta)


def rescale(delta: PyTree, q: Q) -> PyTree:
    """`delta / q`, q a number or one per leaf (a tree, or a dict by name). Shapes and dtypes of `delta`.

    q is converted to the working dtype (float32, or float64 for float64 leaves) and entries are multiplied by
    its reciprocal, which rounds the same on every platform. A quotient outside the range of the leaf's dtype
    becomes infinite, as in any cast: above 65,504 in float16.

    Raises: ValueError for a q that is not positive or has no finite reciprocal, names that do not match, or
      leaves that are not floating.
    """
    scales = _scale_of(q, delta)
    return map_named(lambda name, leaf: _rescale(floating(name, leaf), scales[name]), delta)


def prune(key: jax.Array, delta: PyTree, drop_rate: float, q: Q = None, *, donate: bool = False) -> PyTree:
    """Drops entries of `delta` at random and divides the survivors by q.

    Args:
      key: scalar typed Threefry key; the mask of a leaf depends on it and on the leaf's name alone.
      delta: tree of floating arrays, any shapes. For a float16 model pass the float32 result of
        `compute_delta`: in a float16 delta a survivor whose quotient is above 65,504 becomes infinite.
      drop_rate: probability that an entry is dropped, a Python float in [0, 1).
      q: divisor of the survivors, a number or one per leaf (a tree, or a dict by name); it may be traced.
        None is 1 - drop_rate, which keeps the mean (DARE).
      donate: donate the delta's buffers to the result, which saves one copy of the model; the delta is
        invalid afterwards. An array that several leaves share is kept. Ignored under tracing: use
        `jax.jit(..., donate_argnums=...)` there.
    Returns: a tree like `delta`: same names, shapes, dtypes and shardings.
    Raises: ValueError for a drop_rate or q out of range; TypeError for a key of another type.
    Source: DARE, arXiv:2311.03099; free q: DAREx, arXiv:2410.09344, section 3. Unlike the authors' code the
      rate and q are never rounded to the leaf's dtype.
    """
    leaves = flatten_names(delta)
    keys, uses = leaf_keys(key, leaves), Counter(map(id, leaves.values()))
    threshold = traced_threshold(drop_rate)
    scales = _scale_of(1.0 - drop_rate if q is None else q, delta)

    def prune_leaf(name: str, leaf: Any) -> jax.Array:
        arguments = (floating(name, leaf), keys[name], *threshold, scales[name])
        if any(isinstance(argument, jax.core.Tracer) for argument in arguments):
            return _traced_prune(*arguments)  # traced into the caller's program, whose compiler options apply
        platform = next(iter(arguments[0].devices())).platform
        return _compiled_prune(platform, donate and uses[id(leaf)] == 1)(*arguments)

    return map_named(prune_leaf, delta)


def _prune(
    leaf: jax.Array, key: jax.Array, below: ArrayLike, all_kept: ArrayLike, scale: ArrayLike
) -> jax.Array:
    return _drop_and_rescale(survivors(key, leaf.shape, below, all_kept), leaf, scale)


# Jitted so that it is compiled as one unit also under grad or vmap without jit.
_traced_prune = jax.jit(_prune, inline=True)


@jax.custom_jvp
def _drop_and_rescale(keep: jax.Array, leaf: jax.Array, scale: ArrayLike) -> jax.Array:
    # The select comes after the product on purpose: it keeps the compiler from contracting the product and
    # a later `base + ...` into one fused multiply-add, which rounds differently from one program to the next.
    if leaf.dtype == jnp.bfloat16:
        # Rounded with integer operations: XLA's CPU backend vectorises them, but not its own conversion.
        rounded = lax.reduce_precision(leaf.astype(jnp.float32) * scale, exponent_bits=8, mantissa_bits=7)
        bits = (lax.bitcast_convert_type(rounded, jnp.uint32) >> 16).astype(jnp.uint16)
        return lax.bitcast_convert_type(jnp.where(keep, bits, jnp.uint16(0)), jnp.bfloat16)
    scaled = (leaf.astype(working_dtype(leaf.dtype)) * scale).astype(leaf.dtype)
    return jnp.where(keep, scaled, jnp.zeros((), leaf.dtype))


@_drop_and_rescale.defjvp
def _drop_and_rescale_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (keep, leaf, scale), (_, leaf_dot, scale_dot) = primals, tangents
    tangent = _product_tangent(leaf, scale, leaf_dot, scale_dot)
    return _drop_and_rescale(keep, leaf, scale), jnp.where(keep, tangent, jnp.zeros((), leaf.dtype))


@jax.custom_jvp
def _rescale(leaf: jax.Array, scale: ArrayLike) -> jax.Array:
    return _drop_and_rescale(leaf != 0, leaf, scale)  # the same select, with every nonzero entry kept


@_rescale.defjvp
def _rescale_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _rescale(*primals), _product_tangent(*primals, *tangents)


def _product_tangent(leaf: jax.Array, scale: Any, leaf_dot: jax.Array, scale_dot: jax.Array) -> jax.Array:
    dtype = working_dtype(leaf.dtype)
    return (leaf_dot.astype(dtype) * scale + leaf.astype(dtype) * scale_dot).astype(leaf.dtype)


@cache
def _compiled_prune(platform: str, donate: bool) -> Callable[..., jax.Array]:
    return jax.jit(_prune, donate_argnums=0 if donate else (), compiler_options=compiler_options(platform))


def _scale_of(q: Any, tree: PyTree) -> dict[str, Any]:
    """`{name: 1/q}` for every leaf of `tree`, in the dtype of the leaf's arithmetic."""
    dtypes = {name: working_dtype(dtype_of(name, leaf)) for name, leaf in flatten_names(tree).items()}
    if q is None:
        raise DarexError("q is missing; DARE is q = 1 - drop_rate.")
    by_name = flatten_names(q)
    if list(by_name) == [""]:  # a single number
        of_dtype = {dtype: _reciprocal(by_name[""], dtype) for dtype in set(dtypes.values())}
        return {name: of_dtype[dtype] for name, dtype in dtypes.items()}
    missing, unknown = sorted(dtypes.keys() - by_name.keys()), sorted(by_name.keys() - dtypes.keys())
    if missing or unknown:
        raise DarexError(f"q by name does not match the tree: no q for {missing}; no leaf for {unknown}.")
    return {name: _reciprocal(by_name[name], dtype) for name, dtype in dtypes.items()}


@partial(jax.jit, static_argnums=1, inline=True)
def _traced_reciprocal(q: jax.Array, dtype: Any) -> jax.Array:
    return jnp.ones((), dtype) / q.astype(dtype)


def _reciprocal(q: Any, dtype: Any) -> Any:
    if np.shape(q) != ():
        raise DarexError(f"q is a number, or one number per leaf; got an array of shape {np.shape(q)}.")
    if isinstance(q, jax.core.Tracer):  # its value is not known
        return _traced_reciprocal(q, dtype)
    q = np.asarray(q) if isinstance(q, jax.Array) else q
    if not isinstance(q, int | float | np.generic | np.ndarray):
        raise DarexError(f"q is a number, or one number per leaf; got {q!r:.80}.")
    if not float(q) > 0.0:
        raise DarexError(f"q divides the survivors and must be positive, got {q}.")
    with np.errstate(over="ignore", divide="ignore"):
        scale = dtype(1.0) / dtype(q)
    if not np.isfinite(scale):
        raise DarexError(f"q divides the survivors; {q} is so small that 1/q is infinite.")
    return scale


def check_same(left: Mapping[str, Any], right: Mapping[str, Any], left_word: str, right_word: str) -> None:
    """Raises: ValueError naming every leaf that is in only one of the two or differs in shape."""
    left_shapes = {name: shape_of(name, leaf) for name, leaf in left.items()}
    right_shapes = {name: shape_of(name, leaf) for name, leaf in right.items()}
    faults = [f"'{name}' is only in {left_word}" for name in left_shapes if name not in right_shapes]
    faults += [f"'{name}' is only in {right_word}" for name in right_shapes if name not in left_shapes]
    faults += [
        f"'{name}' is {shape} in {left_word} and {right_shapes[name]} in {right_word}"
        for name, shape in left_shapes.items()
        if name in right_shapes and right_shapes[name] != shape
    ]
    if faults:
        raise DarexError("the trees do not match: " + "; ".join(faults) + ".")
