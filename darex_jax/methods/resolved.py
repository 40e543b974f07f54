"""WANDA survivors whose values are refitted by least squares to compensate for the dropped entries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.importance import kept_count, wanda_mask
from darex_jax.core.tree import PyTree, check_floating, flatten_names, map_named
from darex_jax.methods.budget import Budget
from darex_jax.methods.dare import value_bits
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.magnitude import kept_parts, largest
from darex_jax.parts.total import Parts

DAMPING = 0.01  # of the mean diagonal of the second moments
AT_ONCE = 1 << 24  # matrix entries of one batched solve


def resolved(
    delta: PyTree,
    budget: Budget,
    evidence: Evidence,
    *,
    bits: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> PyTree:
    """WANDA's survivors, with the values that minimise the change of a layer's outputs.

    For each row d and its support: argmin_v (d - v)^T H (d - v) + lambda |v|^2, H the second moments of the
    layer's inputs, lambda a hundredth of its mean diagonal. The input of the table of tokens is the index
    of a row: its H is diagonal, the frequencies of `token_counts`. So entries compete over the whole table,
    and a token that no text has keeps nothing, even where less than the budget is kept then. Other
    parameters keep their own largest entries.

    Args: evidence: with `second_moments`, and `token_counts` if any; bits, dtype: as in `magnitude`.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Raises: DarexError without second moments.
    Source: spec 13; ridge regression on a fixed support as in SparseGPT, arXiv:2301.00774.
    """
    check_floating(delta)
    density = budget.density(value_bits(delta, bits, dtype), places=True)
    moments, counts = flatten_names(evidence.second_moments), flatten_names(evidence.token_counts)
    if not moments:
        raise DarexError("resolved needs evidence with second_moments, by parameter name.")

    def solve(name: str, leaf: Any) -> Parts:
        matrix = np.asarray(leaf, np.float32)
        if name in counts:
            matrix, kept = _of_a_table(matrix, density, np.asarray(counts[name], np.float32))
        elif name in moments:
            h = np.asarray(moments[name], np.float64)
            norms = np.sqrt(np.diag(h)).astype(np.float32)
            kept = np.asarray(wanda_mask({name: leaf}, {name: norms}, 1.0 - density, "row")[name])
            matrix = solved(matrix, kept, h) if kept.any() else matrix
        else:
            kept = largest(matrix, kept_count(1.0 - density, matrix.size))
        return kept_parts(matrix, kept, bits, np.asarray(leaf).dtype if dtype is None else dtype)

    return map_named(solve, delta)


def _of_a_table(matrix: np.ndarray, density: float, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Refitted values and the mask of a table [vocabulary, out] whose row i occurs `counts[i]` times."""
    scores = np.abs(matrix) * np.sqrt(counts)[:, None]
    kept = largest(scores, kept_count(1.0 - density, matrix.size)) & (scores != 0)
    ridge = DAMPING * max(float(np.mean(counts)), 1e-30)
    return matrix * (counts / (counts + ridge))[:, None], kept


def solved(matrix: np.ndarray, kept: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The values of least squared output error at the kept entries, zero elsewhere.

    Args: matrix: [out, in]; kept: bool [out, in], the same number in each row; moments: [in, in], float64.
    """
    places = np.nonzero(kept)[1].reshape(len(matrix), -1)  # [out, k]
    targets = np.take_along_axis(matrix.astype(np.float64) @ moments, places, axis=1)
    ridge = DAMPING * max(float(np.mean(np.diag(moments))), 1e-30) * np.eye(places.shape[1])
    refitted = np.zeros(matrix.shape, np.float32)
    for rows in _row_blocks(len(matrix), places.shape[1]):
        own = places[rows]
        systems = moments[own[:, :, None], own[:, None, :]] + ridge
        values = np.linalg.solve(systems, targets[rows][..., None])[..., 0]
        np.put_along_axis(refitted[rows], own, values.astype(np.float32), axis=1)
    return refitted


def _row_blocks(rows: int, unknowns: int) -> Iterator[slice]:
    step = max(1, AT_ONCE // max(1, unknowns**2))
    return (slice(start, start + step) for start in range(0, rows, step))
