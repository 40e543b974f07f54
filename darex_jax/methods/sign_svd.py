"""Signs, then a low-rank approximation of the residual."""

from __future__ import annotations

from typing import Any

import numpy as np

from darex_jax.core.tree import PyTree, flatten_names, map_named
from darex_jax.methods.budget import RAW_BITS, Budget
from darex_jax.methods.sign import BYTES, check_room, sign_part
from darex_jax.methods.svd import choose_ranks, decompose, low_rank
from darex_jax.methods.vectors import is_matrix, vector_parts
from darex_jax.parts.sign import SignPer
from darex_jax.parts.total import Parts


def sign_svd(
    delta: PyTree,
    budget: Budget,
    evidence: Any = None,
    *,
    per: SignPer = "matrix",
    bits: int | None = None,
) -> PyTree:
    """`sign` of each matrix, and the best low ranks of the residuals with the remaining bytes.

    Args: per: of `sign`; bits: of the factors, as in `svd`.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Raises: DarexError for a budget below one bit per parameter.
    Source: the order of D-QReLO, arXiv:2604.16940; its own quantisation of the factors is not reproduced.
    """
    check_room(budget)
    leaves = flatten_names(delta)
    small, room = vector_parts(delta, budget, bits or RAW_BITS)
    signs = {name: sign_part(leaf, per) for name, leaf in leaves.items() if is_matrix(leaf)}
    rest = {
        name: decompose(np.asarray(leaves[name], np.float32) - np.asarray(part.to_dense()))
        for name, part in signs.items()
    }
    entries = sum(int(np.size(leaves[name])) for name in signs)
    ranks = choose_ranks(rest, room - BYTES * entries * 8 / (bits or RAW_BITS))

    def prune_leaf(name: str, leaf: Any) -> Parts:
        if name in small:
            return small[name]
        more = (low_rank(rest[name], ranks[name], bits),) if ranks[name] else ()
        return Parts((signs[name], *more), tuple(np.shape(leaf)))

    return map_named(prune_leaf, delta)
