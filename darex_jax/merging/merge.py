"""Merging deltas: each is sparsified, then they are summed or averaged under elected signs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.delta import check_same
from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, as_array, flatten_names, map_named, working_dtype
from darex_jax.merging.table import MERGES


def merge(
    deltas: Sequence[PyTree], method: str, *, weights: Sequence[float] | None = None, **options: Any
) -> PyTree:
    """Merges several deltas into one, leaf by leaf: the result of a leaf does not depend on other leaves.

    Args:
      deltas: trees of floating arrays or parts, with the same names and shapes.
      method: a key of `MERGES`.
      weights: of the deltas; None is 1 each. With elected signs the weighted sum is divided by the number of
        agreeing entries.
      options: drop_rate in [0, 1) for all but linear (0.9 keeps a tenth); key, a scalar typed Threefry key
        for random survivors (delta i uses `fold_in(key, i)`); q, their divisor in place of 1 - drop_rate
        (DAREx), a number or one per delta; outliers of breadcrumbs; window of della.
    Returns: a tree like the first delta, float32 (float64 where a leaf is).
    Raises: ValueError for deltas that do not match, a wrong number of weights, or unknown or missing options;
      TypeError for a key of another type.
    Source: `MERGES` and the functions there; sign election and the disjoint mean: TIES, arXiv:2306.01708;
      DARE before merging: arXiv:2311.03099.
    """
    if method not in MERGES:
        raise DarexError(f"{method!r} is not a merging method; choose from {', '.join(MERGES)}.")
    way = MERGES[method]
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(given.keys() - set(way.takes))
    missing = [name for name in ("key", "drop_rate") if name in way.takes and name not in given]
    if unknown or missing:
        what = f"does not accept {', '.join(unknown)}" if unknown else f"requires {', '.join(missing)}"
        raise DarexError(f"{method} {what}.")
    if not deltas:
        raise DarexError("merge needs at least one delta, got none.")
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if len(weights) != len(deltas):
        raise DarexError(f"{len(deltas)} deltas need {len(deltas)} weights, got {len(weights)}.")
    for number, delta in enumerate(deltas[1:], 1):
        check_same(flatten_names(deltas[0]), flatten_names(delta), "the first delta", f"delta {number + 1}")
    named = [flatten_names(delta) for delta in deltas]
    own = [_own(given, i, len(deltas), named[0]) for i in range(len(deltas))]

    def together(name: str, _: Any) -> jax.Array:
        wide = [{name: _wide(name, delta[name])} for delta in named]
        arrays = [
            way.thin(delta, **_of_leaf(options, name))[name] for delta, options in zip(wide, own, strict=True)
        ]
        dtype = working_dtype(*(array.dtype for array in arrays))
        return _together(jnp.stack([array.astype(dtype) for array in arrays]), weights, way.elects)

    return map_named(together, deltas[0])


def _wide(name: str, leaf: Any) -> jax.Array:
    array = as_array(name, leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise DarexError(f"'{name}' holds {array.dtype}: only floating parameters are merged.")
    return array.astype(working_dtype(array.dtype))


def _own(options: Mapping[str, Any], number: int, count: int, names: Iterable[str]) -> dict[str, Any]:
    """The options for one delta. Args: names: of its leaves."""
    own = dict(options)
    if "key" in own:
        own["key"] = jax.random.fold_in(own["key"], number)
    if isinstance(own.get("q"), list | tuple):
        if len(own["q"]) != count:
            raise DarexError(f"{count} deltas need one q or {count}, got {len(own['q'])}.")
        own["q"] = own["q"][number]
    if isinstance(own.get("q"), Mapping):
        own["q"] = flatten_names(own["q"])
        if differing := sorted(own["q"].keys() ^ set(names)):
            raise DarexError(f"q by name does not match the deltas: only one of them has {differing}.")
    return own


def _of_leaf(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options for one leaf: its q, if there is one by name."""
    q = options.get("q")
    return {**options, "q": {name: q[name]}} if isinstance(q, Mapping) else dict(options)


def _together(stack: jax.Array, weights: Sequence[float], elects: bool) -> jax.Array:
    """Combines stacked deltas: [N, ...] -> [...]."""
    weight = np.asarray(weights, stack.dtype).reshape(-1, *[1] * (stack.ndim - 1))
    if not elects:
        return jnp.sum(stack * weight, axis=0)
    positive = jnp.broadcast_to(jnp.sum(stack, axis=0) >= 0, stack.shape)
    agrees = jnp.where(positive, stack > 0, stack < 0)
    return jnp.sum(stack * weight * agrees, axis=0) / jnp.maximum(jnp.sum(agrees, axis=0), 1)
