"""Leaf names of PyTrees, and one PRNG key per leaf.

A leaf's name is its path joined by dots. For a nested Hugging Face state dict that is the
Hugging Face name: `encoder.layer.0.output.dense.weight`. Flax's boxes around an array (`nnx.Variable`,
`linen.Partitioned`) are not part of the path: a leaf of an `nnx.State` or a module has the name that it has
in `nnx.to_pure_dict`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError

PyTree = Any


def flatten_names(tree: PyTree) -> dict[str, Any]:
    """`{name: leaf}` of any PyTree, in the tree's own leaf order.

    Raises: ValueError that names both leaves if two have the same name.
    """
    paths = _paths(tree)
    named = {_name(path): leaf for path, leaf in paths}
    if len(named) < len(paths):
        first: dict[str, Any] = {}
        for path, _ in paths:
            if (other := first.setdefault(_name(path), path)) is not path:
                both = " and ".join(jax.tree_util.keystr(p) for p in (other, path))
                raise DarexError(f"two leaves are called '{_name(path)}': {both}; rename one of them.")
    return named


def unflatten_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have these dotted names; inverse of `flatten_names` on nested dicts.

    Raises: ValueError if one name is a prefix of another, so that a leaf would also be a branch.
    """
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *branches, last = name.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise DarexError(f"'{name}' passes through another parameter of that name.")
        if last in node:
            raise DarexError(f"'{name}' is both a parameter and the prefix of another.")
        node[last] = leaf
    return tree


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The union of nested dicts; for leaves of the same name the last tree's is used.

    Raises: ValueError if a leaf of one tree is a branch of another.
    """
    return unflatten_names({name: leaf for tree in trees for name, leaf in flatten_names(tree).items()})


def map_named(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` with the leaf's name as the function's first argument."""
    structure: Any = jax.tree.structure(tree, is_leaf=is_part)
    others = [structure.flatten_up_to(other) for other in rest]
    rows = zip(_paths(tree), *others, strict=True)
    return structure.unflatten([function(_name(path), leaf, *row) for (path, leaf), *row in rows])


def is_part(node: Any) -> bool:
    """Whether the node is a part or a sum of parts (`darex_jax.parts`), which counts as one leaf."""
    # A Flax box has the attributes of what is in it.
    return hasattr(node, "to_dense") and hasattr(node, "matmul") and not _is_box(node)


def as_array(name: str, leaf: Any) -> jax.Array:
    """The leaf as a JAX array; for parts, their dense sum.

    Raises: ValueError that names a leaf which is not an array.
    """
    if is_part(leaf):
        return leaf.to_dense()
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise DarexError(
            f"'{name}' is a {type(leaf).__name__}, not an array; of an Equinox module pass the arrays alone, "
            "equinox.filter(module, equinox.is_array)."
        ) from error


def floating(name: str, leaf: Any) -> jax.Array:
    """`as_array` of a leaf that can be pruned. Raises: ValueError for one that is not floating."""
    array = as_array(name, leaf)
    _check_floating(name, array.dtype)
    return array


def check_floating(tree: PyTree) -> None:
    """Raises: ValueError that names a leaf which is not an array of floating numbers."""
    for name, leaf in flatten_names(tree).items():
        if is_part(leaf):
            raise DarexError(f"'{name}' is no array; take to_dense() of parts.")
        _check_floating(name, dtype_of(name, leaf))


def _check_floating(name: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise DarexError(f"'{name}' holds {dtype}: only floating parameters are pruned.")


def dtype_of(name: str, leaf: Any) -> Any:
    """The dtype of an array, or of the dense sum of parts. Raises: as `as_array`."""
    if is_part(leaf):
        return np.dtype(np.float32)
    return leaf.dtype if hasattr(leaf, "dtype") else as_array(name, leaf).dtype


def shape_of(name: str, leaf: Any) -> tuple[int, ...]:
    """The shape of an array or a `jax.ShapeDtypeStruct`. Raises: as `as_array`."""
    return tuple(leaf.shape) if hasattr(leaf, "shape") else as_array(name, leaf).shape


def working_dtype(*dtypes: Any) -> Any:
    """The dtype of arithmetic on leaves of these dtypes: float64 if one of them is, else float32."""
    return np.float64 if np.float64 in dtypes else np.float32


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _paths(tree: PyTree) -> list[tuple[tuple[Any, ...], Any]]:
    """`(path, leaf)` of every leaf, without the path components of Flax boxes."""
    found: list[tuple[tuple[Any, ...], Any]] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: _is_box(node) or is_part(node)
    ):
        if _is_box(leaf):
            inside = jax.tree_util.tree_leaves_with_path(leaf, is_leaf=is_part)
            found += [(path + inner[1:], x) for inner, x in inside]
        else:
            found.append((path, leaf))
    return found


def _is_box(node: Any) -> bool:
    # Checked by name, so that Flax need not be imported.
    return any(
        kind.__module__.startswith("flax.") and kind.__name__ in ("Variable", "AxisMetadata")
        for kind in type(node).__mro__
    )


def name_words(name: str) -> tuple[int, int]:
    """Hashes a leaf's name to two uint32: the first 8 bytes of its SHA-256, big-endian."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def seed_key(seed: int) -> jax.Array:
    """`jax.random.key(seed)`, a Threefry key whatever JAX's default is."""
    return jax.random.key(seed, impl="threefry2x32")


def check_key(key: jax.Array) -> None:
    """Raises TypeError unless `key` is a scalar typed Threefry key, the only kind that masks are defined
    for."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"expected a typed key, jax.random.key(seed), got {type(key).__name__}.")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError(
            f"masks are defined for Threefry keys, this one is '{jax.random.key_impl(key)}'; "
            "make it with jax.random.key(seed, impl='threefry2x32')."
        )
    if key.shape != ():
        raise TypeError(f"expected one key, got an array of keys of shape {key.shape}.")


def leaf_key(key: jax.Array, name: str) -> jax.Array:
    """The key of the leaf called `name`; it does not depend on other leaves or on the order of the tree."""
    check_key(key)
    first, second = name_words(name)
    return jax.random.fold_in(jax.random.fold_in(key, first), second)


def stacked_leaf_keys(key: jax.Array, names: Iterable[str]) -> jax.Array:
    """`leaf_key` of every name, [N] in their order.

    Vectorised: unrolled leaf by leaf, the keys of a large model would be most of a program's instructions.
    """
    check_key(key)
    words = np.array([name_words(name) for name in names], np.uint32).reshape(-1, 2)
    return jax.vmap(lambda word: jax.random.fold_in(jax.random.fold_in(key, word[0]), word[1]))(words)


def leaf_keys(key: jax.Array, names: Iterable[str]) -> dict[str, jax.Array]:
    """`leaf_key` of every name, by name."""
    names = list(names)
    keys = stacked_leaf_keys(key, names)
    return {name: keys[i] for i, name in enumerate(names)}
