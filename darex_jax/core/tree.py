"""Names of leaves, and one PRNG key per leaf.

A leaf's name is its path joined by dots. For a Hugging Face state dict, nested, that is the
Hugging Face name: `encoder.layer.0.output.dense.weight`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from darex_jax.core.errors import DarexError

PyTree = Any


def flatten_names(tree: PyTree) -> dict[str, Any]:
    """`{name: leaf}` of any PyTree, in the tree's own leaf order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


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
    """The union of nested dicts; of leaves with one name, the last tree's stays.

    Raises: ValueError if a leaf of one is a branch of another.
    """
    return unflatten_names({name: leaf for tree in trees for name, leaf in flatten_names(tree).items()})


def map_named(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function gets each leaf's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(jax.tree_util.keystr(path, simple=True, separator="."), *leaves),
        tree,
        *rest,
    )


def name_words(name: str) -> tuple[int, int]:
    """The two uint32 that stand for a leaf's name: the first 8 bytes of its SHA-256, big-endian."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def check_key(key: jax.Array) -> None:
    """Raises TypeError unless `key` is one typed Threefry key: the only kind a mask is defined for."""
    if not (hasattr(key, "dtype") and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"expected a typed key, jax.random.key(seed), got {type(key).__name__}.")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError(
            f"masks are defined for Threefry keys, this one is '{jax.random.key_impl(key)}'; "
            "make it with jax.random.key(seed, impl='threefry2x32')."
        )
    if key.shape != ():
        raise TypeError(f"expected one key, got an array of keys of shape {key.shape}.")


def leaf_key(key: jax.Array, name: str) -> jax.Array:
    """The key of the leaf called `name`; neither its neighbours nor its place in the tree play a part."""
    check_key(key)
    first, second = name_words(name)
    return jax.random.fold_in(jax.random.fold_in(key, first), second)


def leaf_keys(key: jax.Array, names: Iterable[str]) -> dict[str, jax.Array]:
    """`leaf_key` of every name, by name.

    All at once: written out leaf by leaf, the keys of a large model are most of a program's instructions.
    """
    check_key(key)
    names = list(names)
    words = np.array([name_words(name) for name in names], np.uint32).reshape(-1, 2)
    keys = jax.vmap(lambda word: jax.random.fold_in(jax.random.fold_in(key, word[0]), word[1]))(words)
    return {name: keys[i] for i, name in enumerate(names)}
