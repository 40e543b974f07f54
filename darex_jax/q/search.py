"""Algorithm 2 of DAREx: a search for one q by a coarse grid and a finer one around its best point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
      q: the visited point chosen: the middle of the plateau.
      value: the objective at q.
      plateau: first and last of the neighbouring visited points that share the best value; (q, q) if there is
        but one.
      curve: every visited (q, value), by rising q.
    """

    q: float
    value: float
    plateau: tuple[float, float]
    curve: list[tuple[float, float]]


def search_q(
    objective: Callable[[float], float],
    low: float,
    high: float,
    step: float,
    *,
    maximise: bool,
    patience: int = 3,
    decay: float = 0.1,
    refinements: int = 1,
) -> SearchResult:
    """Searches q in [low, high], both inclusive when the steps meet `high`.

    Each pass walks upwards and ends after more than `patience` values in a row that are worse than the pass's
    best; a tie is no worse, so that a flat beginning does not end the walk. A refinement visits the points
    `best + j * step * decay` strictly between the best point's neighbours. No q is evaluated twice. Points
    are computed from their number and rounded to 12 digits: the same decimal numbers everywhere.

    Args:
      objective: q -> value; a value that is not finite counts as worse than any other.
      low, high, step: the coarse grid, 0 < low <= high, step > 0.
      maximise: whether larger values are better (a metric) or smaller ones (an output change).
      decay: each refinement's step is `decay` times the one before, 0 < decay < 1.
    Raises: ValueError for a grid that is none, or if no value is finite.
    Source: DAREx (arXiv:2410.09344), Algorithm 2, with the stopping rule of the authors' code. Unlike there,
      points stay within [low, high], and of equal best values the middle is taken, not the first visited.
    """
    if not (0.0 < low <= high < math.inf and 0.0 < step < math.inf):
        raise ValueError(f"need 0 < low <= high and step > 0, got low={low}, high={high}, step={step}.")
    if not 0.0 < decay < 1.0 or refinements < 0 or patience < 0:
        raise ValueError(
            f"need 0 < decay < 1, patience >= 0 and refinements >= 0, "
            f"got decay={decay}, patience={patience}, refinements={refinements}."
        )
    sign = 1.0 if maximise else -1.0
    values: dict[float, float] = {}

    def score(q: float) -> float:
        return sign * values[q] if math.isfinite(values[q]) else -math.inf

    def walk(points: Sequence[float]) -> None:
        best, worse_in_a_row = -math.inf, 0
        for q in points:
            if q not in values:
                values[q] = float(objective(q))
            if score(q) >= best:
                best, worse_in_a_row = score(q), 0
            else:
                worse_in_a_row += 1
            if worse_in_a_row > patience:
                return

    def plateau() -> list[float]:
        """The longest run of neighbouring visited points with the best value, the first of equals."""
        best = max(map(score, values))
        runs: list[list[float]] = [[]]
        for q in sorted(values):
            if score(q) == best:
                runs[-1].append(q)
            else:
                runs.append([])
        return max(runs, key=len)

    def middle(run: Sequence[float]) -> float:
        return min(run, key=lambda q: (round(abs(q - (run[0] + run[-1]) / 2), 12), q))

    walk([round(low + i * step, 12) for i in range(math.floor((high - low) / step + 1e-9) + 1)])
    for _ in range(refinements):
        centre, reach = middle(plateau()), math.ceil(1 / decay - 1e-9) - 1
        step *= decay
        fine = (round(centre + j * step, 12) for j in range(-reach, reach + 1))
        walk([q for q in fine if low <= q <= high])
    if not any(math.isfinite(v) for v in values.values()):
        raise ValueError(f"the objective is finite at none of the {len(values)} visited q, {low} to {high}.")
    run = plateau()
    q = middle(run)
    return SearchResult(q, values[q], (run[0], run[-1]), sorted(values.items()))


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean without the value farthest from the mean (the first of equals), as over the masks of seeds 0 to 3.

    Of one or two values nothing is left out. Source: the authors' code for DAREx, Algorithm 2.
    """
    if not values:
        raise ValueError("the mean of no values does not exist.")
    kept = list(values)
    mean = math.fsum(kept) / len(kept)
    if len(kept) > 2 and math.isfinite(mean):
        kept.pop(max(range(len(kept)), key=lambda i: abs(kept[i] - mean)))
    return math.fsum(kept) / len(kept)
