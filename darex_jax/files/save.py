"""Writes a delta in memory as an artifact of format 1."""

import os
from typing import Any

import blake3
import numpy as np

from darex_jax.core.divisor import resolve_q
from darex_jax.core.errors import DarexError
from darex_jax.core.mask import survivor_indices
from darex_jax.core.threefry import keep_threshold, numpy_leaf_key
from darex_jax.core.tree import name_words
from darex_jax.files.recipe import Recipe, is_name, tensor_line, versions, warn_of_little
from darex_jax.files.safetensors import DTYPE_NAMES, as_bytes, write_tensors
from darex_jax.files.stream import count_nonfinite


def save_delta(
    path: str | os.PathLike[str],
    key: Any,
    delta: Any,
    drop_rate: float,
    q: Any = None,
    *,
    base: Any,
) -> Recipe:
    """Prunes a delta and writes the artifact atomically, for `darex apply` and `load_delta`.

    Args:
      key: scalar typed Threefry key.
      delta: tree of floating arrays, before pruning; values are stored in its leaves' dtypes.
      drop_rate, q: as in `prune`; q a number, or one per leaf as a tree or a dict by name.
      base: the tree that the delta belongs to, fingerprinted; it has all names of `delta` with the same
        shapes. The restored parameters have its dtypes, as after `apply_delta`; its integer leaves are not
        changed, so that their delta is zero.
    Raises: ValueError for arguments out of range, or a delta or a q that does not match.
    """
    import jax

    from darex_jax.core.tree import check_key, flatten_names

    check_key(key)
    words = np.asarray(jax.random.key_data(key))
    threshold = keep_threshold(drop_rate)
    deltas = {name: np.asarray(leaf) for name, leaf in flatten_names(delta).items()}
    bases = {name: np.asarray(leaf) for name, leaf in flatten_names(base).items()}
    for name, leaf in bases.items():
        if not is_name(f"values/{name}"):
            raise DarexError(f"{name[:80]!a} is not a valid parameter name in a file.")
        if leaf.dtype not in DTYPE_NAMES:
            raise DarexError(f"'{name}' of the base is {leaf.dtype}, which an artifact cannot store.")
    for name, leaf in deltas.items():
        if name not in bases or bases[name].shape != leaf.shape:
            raise DarexError(f"'{name}' of the delta has no base parameter of shape {list(leaf.shape)}.")
        if leaf.dtype not in DTYPE_NAMES or leaf.dtype.kind not in "fV":  # bfloat16 is of kind V
            raise DarexError(
                f"'{name}' of the delta holds {leaf.dtype}: only floating parameters are pruned."
            )
        if bases[name].dtype.kind not in "fV" and leaf.any():
            raise DarexError(
                f"'{name}' of the base holds {bases[name].dtype}, which a delta does not change."
            )
    changed = {name: leaf for name, leaf in deltas.items() if bases[name].dtype.kind in "fV"}
    named_q = None if q is None else flatten_names(q)
    by_name = named_q[""] if named_q is not None and list(named_q) == [""] else named_q  # a single number
    q_by_name = resolve_q(by_name, drop_rate, list(changed), unused=deltas)
    deltas = changed
    tensors = {}
    for name in sorted(deltas, key=lambda n: (-deltas[n].dtype.itemsize, n)):
        leaf_key = numpy_leaf_key(tuple(map(int, words)), name_words(name))
        kept = survivor_indices(leaf_key, deltas[name].size, threshold)
        tensors[f"values/{name}"] = deltas[name].reshape(-1)[kept]
    digest = blake3.blake3()
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):  # file order
        digest.update(tensor_line(name, tensors[name].dtype, tensors[name].shape))
        digest.update(as_bytes(tensors[name]))
    recipe = Recipe(
        format=1,
        method="dare" if q is None else "darex-q",
        drop_rate=float(drop_rate),
        key=(int(words[0]), int(words[1])),
        scope="the delta's own leaves",
        parameters={
            name: {"shape": list(leaf.shape), "q": q_by_name[name], "dtype": DTYPE_NAMES[bases[name].dtype]}
            for name, leaf in deltas.items()
        },
        base={
            name: {
                "dtype": DTYPE_NAMES[leaf.dtype],
                "shape": list(leaf.shape),
                "blake3": blake3.blake3(as_bytes(np.ascontiguousarray(leaf))).hexdigest(),
            }
            for name, leaf in bases.items()
        },
        base_names={},
        base_only=[],
        inexact=0,
        nonfinite=sum(count_nonfinite(tree[name].reshape(-1)) for tree in (deltas, bases) for name in deltas),
        versions=versions(),
        data_blake3=digest.hexdigest(),
    )
    write_tensors(path, tensors, recipe.to_metadata())
    same = not any(np.any(leaf) for leaf in deltas.values())
    warn_of_little(drop_rate, q_by_name, same=same, survivors=sum(x.size for x in tensors.values()))
    return recipe
