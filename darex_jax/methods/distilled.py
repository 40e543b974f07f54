"""Low-rank factors and whole vectors, trained until the model answers as the fine-tuned one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.core.tree import PyTree, flatten_names, map_named
from darex_jax.methods.budget import RAW_BITS, Budget
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.svd import choose_ranks, decompose, low_rank
from darex_jax.methods.vectors import is_matrix, whole
from darex_jax.parts.rounding import rounded
from darex_jax.parts.total import Parts

VECTORS = 0.5  # of the budget, that norms and biases may take whole
OTHERS = 0.2  # of the budget, that one rank of what is no linear layer, an embedding, may take


def distilled(delta: PyTree, budget: Budget, evidence: Evidence, *, bits: int | None = None) -> PyTree:
    """A support for every kind of parameter, whose values are then trained through their rounding.

    Matrices get the best low rank, the ranks bought over all of them as in `svd`; but an embedding, most of
    whose rows no text touches, gets none where one would take more than a fifth of the budget. Norms and
    biases are whole where they take at most half of it. A start that weighs inputs by their second moments
    did not end better.

    Args:
      evidence: with `input_norms`, whose names are those of the linear layers, and `train`; without the
        latter values are rounded as they are.
      bits: of every value; None is bfloat16.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Source: spec 13.
    """
    leaves = flatten_names(delta)
    room = budget.numbers(sum(int(np.size(leaf)) for leaf in leaves.values()), bits or RAW_BITS)
    vectors = {name: leaf for name, leaf in leaves.items() if not is_matrix(leaf)}
    spent = sum(int(np.size(leaf)) for leaf in vectors.values())
    if spent > VECTORS * room:
        vectors, spent = {}, 0
    matrices = {name: leaf for name, leaf in leaves.items() if is_matrix(leaf)}
    factors = {
        name: decompose(leaf)
        for name, leaf in matrices.items()
        if name in evidence.input_norms or sum(np.shape(leaf)) <= OTHERS * room
    }
    ranks = choose_ranks(factors, room - spent)

    def support(name: str, leaf: Any) -> Parts:
        shape = tuple(np.shape(leaf))
        if name in vectors:
            return whole(leaf, jnp.float32)
        if ranks.get(name, 0):
            return Parts((low_rank(factors[name], ranks[name], None, jnp.float32),), shape)
        return Parts((), shape)

    found = flatten_names(map_named(support, delta))
    stored = {name: parts for name, parts in found.items() if parts.parts}
    trained: Mapping[str, Parts]
    if evidence.train is None or not stored:
        trained = {name: rounded(parts, bits) for name, parts in stored.items()}
    else:
        trained = evidence.train(stored, bits)
    return map_named(lambda name, _: trained.get(name, found[name]), delta)
