"""WANDA: the entries with the largest influence on a layer's outputs."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from darex_jax.core.errors import DarexError
from darex_jax.core.importance import wanda_mask
from darex_jax.core.tree import PyTree, check_floating, flatten_names
from darex_jax.methods.budget import Budget
from darex_jax.methods.dare import value_bits
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.magnitude import kept_parts


def wanda(
    delta: PyTree,
    budget: Budget,
    evidence: Evidence,
    *,
    group: Literal["row", "matrix"] = "row",
    bits: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> PyTree:
    """The `1 - p` largest `|delta[i, j]| * ||x_j||` of each row, or of each matrix; no rescaling.

    Parameters without input norms (biases, embeddings) are compared by magnitude.

    Args:
      evidence: with `input_norms`.
      group, bits, dtype: as in `wanda_mask` and `magnitude`.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Raises: DarexError without input norms.
    Source: WANDA, arXiv:2306.11695, applied to deltas as in DAREx (arXiv:2410.09344).
    """
    check_floating(delta)
    density = budget.density(value_bits(delta, bits, dtype), places=True)
    names = flatten_names(delta).keys()
    known = flatten_names(evidence.input_norms)
    if not known:
        raise DarexError("wanda needs evidence with input_norms, by parameter name.")
    norms = {name: norm for name, norm in known.items() if name in names}
    masks = wanda_mask(delta, norms, 1.0 - density, group)
    return jax.tree.map(lambda leaf, mask: kept_parts(leaf, mask, bits, dtype), delta, masks)
