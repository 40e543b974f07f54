"""BitDelta: the sign of every entry and a scale."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, map_named
from darex_jax.methods.budget import Budget, TooSmall
from darex_jax.methods.vectors import is_matrix, vector_parts
from darex_jax.parts.sign import Sign, SignPer, pack_signs
from darex_jax.parts.total import Parts

BYTES = 1 / 8  # per parameter


def sign(delta: PyTree, budget: Budget, evidence: Any = None, *, per: SignPer = "matrix") -> PyTree:
    """`sign(delta) * mean |delta|` of each matrix; vectors as in `vector_parts`.

    The mean is the least-squares optimal scale. Vectors come on top of one bit per entry.

    Args: per: one scale per "matrix", "row" or "column".
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Raises: TooSmall for a budget below one bit per parameter.
    Source: BitDelta, arXiv:2402.10193, before its scales are distilled.
    """
    check_room(budget)
    small, _ = vector_parts(delta, budget)

    def prune_leaf(name: str, leaf: Any) -> Parts:
        part = sign_part(leaf, per) if is_matrix(leaf) else None
        return small[name] if part is None else Parts((part,), part.shape)

    return map_named(prune_leaf, delta)


def check_room(budget: Budget) -> None:
    if budget.bytes_per_parameter is not None and budget.bytes_per_parameter < BYTES:
        raise TooSmall(
            f"signs alone take {BYTES} bytes per parameter: choose another method or a larger size."
        )


def sign_part(leaf: Any, per: SignPer) -> Sign:
    """Signs of a matrix and their mean magnitudes in bfloat16."""
    if per not in get_args(SignPer):
        raise DarexError(f"per is one of {', '.join(get_args(SignPer))}, got {per!r}.")
    matrix = jnp.asarray(np.asarray(leaf), jnp.float32)  # on one device, wherever the leaf is
    axis = {"matrix": None, "row": 1, "column": 0}[per]
    scales = jnp.mean(jnp.abs(matrix), axis=axis).reshape(-1).astype(jnp.bfloat16)
    one = np.asarray(np.float32(1))
    return Sign(np.asarray(pack_signs(matrix)), np.asarray(scales), one, per, tuple(matrix.shape))
