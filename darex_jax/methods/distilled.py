"""Distillation: the kept values are trained to reproduce the fine-tuned model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, check_floating, flatten_names, map_named
from darex_jax.methods.allocated import affordable_vectors, divide
from darex_jax.methods.budget import RAW_BITS, Budget
from darex_jax.methods.dare import dare
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.magnitude import magnitude
from darex_jax.methods.sign import check_room, sign_part
from darex_jax.methods.svd import choose_ranks, decompose, low_rank
from darex_jax.methods.vectors import is_matrix
from darex_jax.parts.rounding import rounded
from darex_jax.parts.total import Parts

Support = Literal["allocated", "low-rank", "largest", "random", "sign"]
OTHERS = 0.2  # largest share of the budget for one rank of an embedding


def distilled(
    delta: PyTree,
    budget: Budget,
    evidence: Evidence,
    *,
    key: jax.Array,
    support: Support = "low-rank",
    bits: int | None = None,
) -> PyTree:
    """Chooses what is kept of each parameter; its values are then trained, with quantisation in the loop.

    Norms and biases are kept whole if they take at most half of the budget. Of matrices is kept, by
    `support`: "low-rank", the best low rank, with ranks allocated over all of them as in `svd`, except that
    an embedding gets none if one rank would take more than a fifth of the budget; "allocated", the parts of
    `allocated`; "largest", the largest entries of linear layers, with stored indices; "random", those of the
    key's mask, without; "sign", the sign of every entry, one bit, and a scale of each matrix, which alone is
    trained (BitDelta). Initialising with inputs weighted by their second moments gave no better result.

    Args:
      evidence: with `linear_layers` and `train`; without `train` values are quantised only.
      key: scalar typed Threefry key, for support "random".
      bits: of every value; None is bfloat16.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Raises: DarexError for another support, or one of linear layers without any of them; TooSmall for support
      "sign" and a budget below one bit per parameter.
    Source: spec 13; a random subspace: arXiv:1804.08838; BitDelta: arXiv:2402.10193.
    """
    if support not in get_args(Support):
        raise DarexError(f"support is one of {', '.join(get_args(Support))}, got {support!r}.")
    check_floating(delta)
    leaves = flatten_names(delta)
    room = budget.numbers(sum(int(np.size(leaf)) for leaf in leaves.values()), bits or RAW_BITS)
    chosen = affordable_vectors(leaves, room)
    spent = sum(int(np.size(leaves[name])) for name in chosen)
    matrices = {name: leaf for name, leaf in leaves.items() if is_matrix(leaf)}
    linear = {name: leaf for name, leaf in matrices.items() if name in evidence.linear_layers}
    if support == "low-rank":
        cheap = {name: leaf for name, leaf in matrices.items() if sum(np.shape(leaf)) <= OTHERS * room}
        if matrices and not linear | cheap:
            raise DarexError("the evidence names no linear layer in the delta; pass linear_layers.")
        chosen |= _factors(linear | cheap, room - spent)
    elif support == "allocated":
        width = bits or RAW_BITS
        chosen |= divide(matrices, (room - spent) * width, width, evidence.curvature)
    elif support == "sign":
        check_room(budget)
        chosen |= {name: _signs(leaf) for name, leaf in matrices.items()}
    else:
        if not linear:
            raise DarexError(
                f"support {support!r} is of linear layers, and the evidence names none in the delta."
            )
        chosen |= _survivors(linear, support, (room - spent) * (bits or RAW_BITS) / 8, bits, key)

    stored = {name: parts for name, parts in chosen.items() if parts.parts}
    trained: Mapping[str, Parts]
    if evidence.train is None or not stored:
        trained = {name: rounded(parts, bits, coarse=True) for name, parts in stored.items()}
    else:
        trained = evidence.train(stored, bits)
    return map_named(lambda name, leaf: trained.get(name, Parts((), tuple(np.shape(leaf)))), delta)


def _factors(matrices: Mapping[str, Any], room: float) -> dict[str, Parts]:
    """Low-rank parts of `room` numbers in all; matrices of rank 0 are left out."""
    factors = {name: decompose(leaf) for name, leaf in matrices.items()}
    ranks = {name: rank for name, rank in choose_ranks(factors, room).items() if rank}
    return {
        name: Parts((low_rank(factors[name], rank, None, jnp.float32),), tuple(np.shape(matrices[name])))
        for name, rank in ranks.items()
    }


def _signs(leaf: Any) -> Parts:
    part = sign_part(leaf, "matrix")
    return Parts((part,), part.shape)


def _survivors(
    matrices: Mapping[str, Any], support: Support, room: float, bits: int | None, key: jax.Array
) -> dict[str, Parts]:
    """Single entries of `room` bytes in all, as floats, not rescaled."""
    entries = sum(int(np.size(leaf)) for leaf in matrices.values())
    if room <= 0:
        return {}
    budget = Budget(bytes_per_parameter=room / entries)
    density = budget.density(bits or RAW_BITS, places=support == "largest")
    kept = Budget(drop_rate=1.0 - density)
    if support == "largest":
        return magnitude(dict(matrices), kept, dtype=jnp.float32)
    return dare(dict(matrices), kept, key=key, q=1.0, dtype=jnp.float32)
