"""Truncated SVD, with ranks allocated over all matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, flatten_names, map_named
from darex_jax.methods.budget import RAW_BITS, Budget
from darex_jax.methods.vectors import is_matrix, vector_parts
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.rounding import rounded_part
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values


class Factors(NamedTuple):
    """`left @ diag(values) @ right`: [out, n], [n], [n, in], in decreasing order."""

    left: Any
    values: Any
    right: Any


def svd(delta: PyTree, budget: Budget, evidence: Any = None, *, bits: int | None = None) -> PyTree:
    """The best low-rank approximations of all matrices together; vectors as in `vector_parts`.

    Singular values of all matrices are kept in order of s^2 / (out + in), the error removed per stored
    number.

    Args:
      budget: of numbers stored; bits: of factors, None is bfloat16; scales per column of A and row of B.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    """
    small, room = vector_parts(delta, budget, bits or RAW_BITS)
    factors = {name: decompose(leaf) for name, leaf in flatten_names(delta).items() if is_matrix(leaf)}
    ranks = choose_ranks(factors, room)

    def prune_leaf(name: str, leaf: Any) -> Parts:
        if name in small:
            return small[name]
        shape = tuple(np.shape(leaf))
        return Parts((low_rank(factors[name], ranks[name], bits),) if ranks[name] else (), shape)

    return map_named(prune_leaf, delta)


def decompose(matrix: Any) -> Factors:
    """The SVD, from the eigendecomposition of the smaller Gram matrix.

    In float64, so that singular values down to 1e-7 of the largest are accurate; smaller ones are set to 0.
    For a tall matrix (an embedding) this is many times faster than an SVD of the matrix itself.

    Args: matrix: [out, in]. Raises: DarexError if it is not finite.
    """
    wide = np.asarray(matrix, np.float64)
    tall = wide.shape[0] >= wide.shape[1]
    thin = wide if tall else wide.T
    if not np.isfinite(wide.sum()) and not np.isfinite(wide).all():
        raise DarexError("a matrix holds NaN or infinity, which has no singular values.")
    squares, vectors = np.linalg.eigh(thin.T @ thin)
    squares, vectors = squares[::-1], vectors[:, ::-1]
    values = np.sqrt(np.maximum(squares, 0.0))
    values[values < 1e-7 * values.max(initial=0.0)] = 0.0
    others = thin @ (vectors / np.where(values > 0, values, 1.0))
    left, right = (others, vectors.T) if tall else (vectors, others.T)
    return Factors(*(np.asarray(x, np.float32) for x in (left, values, right)))


def choose_ranks(factors: Mapping[str, Factors], room: float) -> dict[str, int]:
    """How many singular values of each matrix are kept, for `room` numbers stored in all."""
    cost = {name: f.left.shape[0] + f.right.shape[1] for name, f in factors.items()}
    worth = [
        (-(float(s) ** 2) / cost[name], name) for name, f in factors.items() for s in f.values if float(s) > 0
    ]
    ranks = dict.fromkeys(factors, 0)
    for _, name in sorted(worth):
        if cost[name] <= room:
            ranks[name] += 1
            room -= cost[name]
    return ranks


def low_rank(factors: Factors, rank: int, bits: int | None, dtype: Any = jnp.bfloat16) -> LowRank:
    """The first `rank` singular values; each factor gets their square root.

    Args: bits: None casts to `dtype`; otherwise `dtype` is that of the scales.
    """
    root = np.sqrt(factors.values[:rank])
    a, b = factors.left[:, :rank] * root, factors.right[:rank] * root[:, None]
    part = LowRank(Values(a), Values(b), np.asarray(np.float32(1)), (a.shape[0], b.shape[1]))
    return rounded_part(part, bits, dtype)
