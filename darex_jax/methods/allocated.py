"""Allocates one byte budget over all matrices and kinds of part by estimated error reduction per byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from darex_jax.core.errors import DarexError
from darex_jax.core.tree import PyTree, check_floating, flatten_names, map_named
from darex_jax.methods.budget import RAW_BITS, Budget, entropy
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.magnitude import kept_parts, largest
from darex_jax.methods.svd import decompose, low_rank
from darex_jax.methods.vectors import is_matrix, whole
from darex_jax.parts.columns import Columns
from darex_jax.parts.rounding import rounded
from darex_jax.parts.total import Parts
from darex_jax.parts.values import Values

VECTORS = 0.5  # largest share of the budget for norms and biases stored whole
STEPS = 64  # candidate numbers of entries, between one and all
HALVINGS = 60


def allocated(delta: PyTree, budget: Budget, evidence: Evidence, *, bits: int | None = None) -> PyTree:
    """For each matrix a low rank, its largest entries or its largest columns, at one price per byte for all.

    The worth of a part is the squared error that it removes, times the square root of the parameter's mean
    curvature. The curvature itself would overrate embeddings, whose errors do not add up as those of a layer
    do, and starve layers with large deltas. Norms and biases are stored whole if they take at most half of
    the budget. Weighting the rows and columns of a matrix by their gradients did worse than one weight per
    matrix.

    Args:
      evidence: with `curvature`; a parameter without one gets the mean of the others.
      bits: of every value; None is bfloat16.
    Returns: a tree like `delta` with a `Parts` for each leaf.
    Source: spec 13; bit allocation at equal slope, as in Shoham and Gersho, 1988.
    """
    check_floating(delta)
    leaves = flatten_names(delta)
    width = bits or RAW_BITS
    room = budget.numbers(sum(int(np.size(leaf)) for leaf in leaves.values()), width)
    chosen = affordable_vectors(leaves, room)
    spent = sum(int(np.size(leaves[name])) for name in chosen)
    matrices = {name: leaf for name, leaf in leaves.items() if is_matrix(leaf)}
    chosen |= divide(matrices, (room - spent) * width, width, evidence.curvature)

    def stored(name: str, leaf: Any) -> Parts:
        return rounded(chosen[name], bits) if name in chosen else Parts((), tuple(np.shape(leaf)))

    return map_named(stored, delta)


def affordable_vectors(leaves: Mapping[str, Any], room: float) -> dict[str, Parts]:
    """All leaves that are not matrices, whole in float32, if they fit in half of `room`, or all leaves in it;
    else none. Raises: DarexError if one that does not fit has more than two axes."""
    vectors = {name: leaf for name, leaf in leaves.items() if not is_matrix(leaf)}
    own, entries = (sum(int(np.size(leaf)) for leaf in some.values()) for some in (vectors, leaves))
    if own > VECTORS * room and entries > room:
        if large := [name for name, leaf in vectors.items() if np.ndim(leaf) > 2]:
            raise DarexError(
                f"'{large[0]}' has {np.ndim(leaves[large[0]])} axes, but this method prunes matrices: "
                "reshape it, or take magnitude."
            )
        return {}
    return {name: whole(leaf, jnp.float32) for name, leaf in vectors.items()}


class Offer(NamedTuple):
    """One kind of part for one matrix, in increasing sizes from zero.

    Attributes:
      bits, worth: of each size; both start at 0.
      make: index of a size -> its part, float32.
    """

    bits: np.ndarray
    worth: np.ndarray
    make: Callable[[int], Parts]


def divide(
    matrices: Mapping[str, Any], room: float, width: int, curvature: Mapping[str, float]
) -> dict[str, Parts]:
    """Divides `room` bits among matrices; returns float32 parts of those that get any.

    Args: width: bits per value; curvature: per matrix; its square root weights squared errors.
    """
    roots = {name: float(np.sqrt(curvature[name])) for name in matrices if name in curvature}
    mean = float(np.mean(list(roots.values()))) if roots else 1.0
    offers = {
        name: _offers(np.asarray(leaf, np.float32), roots.get(name, mean), width)
        for name, leaf in matrices.items()
    }

    def bought(price: float) -> dict[str, tuple[Offer, int]]:
        """For each matrix the offer and size with the largest worth minus price."""
        best = {}
        for name, of_matrix in offers.items():
            gains = [offer.worth - price * offer.bits for offer in of_matrix]
            kind = int(np.argmax([gain.max() for gain in gains]))
            best[name] = of_matrix[kind], int(np.argmax(gains[kind]))
        return best

    def cost(best: Mapping[str, tuple[Offer, int]]) -> float:
        return sum(float(offer.bits[size]) for offer, size in best.values())

    every = [offer for of_matrix in offers.values() for offer in of_matrix]
    rates = [float(np.max(offer.worth[1:] / offer.bits[1:])) for offer in every]
    low, high = 0.0, 2 * max(rates, default=0.0) + 1e-30  # at `high` nothing is bought
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(bought(middle)) <= room else (middle, high)
    return {name: offer.make(size) for name, (offer, size) in bought(high).items() if size}


def _offers(matrix: np.ndarray, weight: float, width: int) -> list[Offer]:
    return [_ranks(matrix, weight, width), _entries(matrix, weight, width), _columns(matrix, weight, width)]


def _ranks(matrix: np.ndarray, weight: float, width: int) -> Offer:
    factors = decompose(matrix)
    worth = weight * np.cumsum(np.square(factors.values, dtype=np.float64))
    bits = width * sum(matrix.shape) * np.arange(1, len(worth) + 1)

    def make(rank: int) -> Parts:
        return Parts((low_rank(factors, rank, None, jnp.float32),), matrix.shape)

    return Offer(_from_nothing(bits), _from_nothing(worth), make)


def _entries(matrix: np.ndarray, weight: float, width: int) -> Offer:
    squares = np.sort(np.square(matrix, dtype=np.float64), axis=None)[::-1]
    counts = np.unique(np.geomspace(1, matrix.size, STEPS).astype(np.int64))
    worth = weight * np.cumsum(squares)[counts - 1]
    bits = [count * width + matrix.size * entropy(count / matrix.size) for count in counts]

    def make(size: int) -> Parts:
        kept = largest(matrix, int(counts[size - 1]))
        return kept_parts(matrix, kept, None, np.float32)

    return Offer(_from_nothing(bits), _from_nothing(worth), make)


def _columns(matrix: np.ndarray, weight: float, width: int) -> Offer:
    squares = np.sum(np.square(matrix, dtype=np.float64), axis=0)
    order = np.argsort(-squares, kind="stable")
    worth = weight * np.cumsum(squares[order])
    counts = np.arange(1, len(order) + 1)
    bits = [count * width * len(matrix) + len(order) * entropy(count / len(order)) for count in counts]

    def make(count: int) -> Parts:
        chosen = np.sort(order[:count]).astype(np.uint32)
        values = Values(jnp.asarray(matrix[:, chosen]))
        return Parts((Columns(values, chosen, np.asarray(np.float32(1)), matrix.shape),), matrix.shape)

    return Offer(_from_nothing(bits), _from_nothing(worth), make)


def _from_nothing(rising: Any) -> np.ndarray:
    return np.concatenate([[0.0], np.asarray(rising, np.float64)])
