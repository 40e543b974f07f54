"""Algorithm 2 of DAREx: a search for one q by a coarse grid and a finer one around its best point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from darex_jax.core.errors import DarexError


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


def linear_grid(low: float, high: float, step: float) -> list[float]:
    """low, low + step, ... up to `high`, inclusive when the steps meet it: the grid of Algorithm 2.

    Points are computed from their number and rounded to 12 digits: the same decimal numbers everywhere.
    Raises: ValueError for a grid that is none.
    """
    if not (0.0 < low <= high < math.inf and 0.0 < step < math.inf):
        raise DarexError(f"need 0 < low <= high and step > 0, got low={low}, high={high}, step={step}.")
    return [round(low + i * step, 12) for i in range(math.floor((high - low) / step + 1e-9) + 1)]


def geometric_grid(low: float, high: float, ratio: float = math.sqrt(2.0)) -> list[float]:
    """low, low * ratio, low * ratio^2, ... up to `high`; all but the first rounded to 4 significant digits.

    Raises: ValueError for a grid that is none.
    """
    if not (0.0 < low <= high < math.inf and 1.0 < ratio < math.inf):
        raise DarexError(f"need 0 < low <= high and ratio > 1, got low={low}, high={high}, ratio={ratio}.")
    count = math.floor(math.log(high / low) / math.log(ratio) + 1e-9)
    return [low, *(float(f"{low * ratio**i:.4g}") for i in range(1, count + 1))]


def search_q(
    objective: Callable[[float], float],
    coarse: Sequence[float],
    *,
    maximise: bool,
    whole: bool = False,
    patience: int = 3,
    decay: float = 0.1,
    refinements: int = 1,
) -> SearchResult:
    """Visits a coarse grid upwards, then finer ones around the best point.

    Each pass ends after more than `patience` values in a row that are worse than the pass's best; a tie is no
    worse, so that a flat beginning does not end it. A refinement visits points strictly between the best
    point's neighbours, `decay` times the distance to each apart. No q is evaluated twice.

    Args:
      objective: q -> value; a value that is not finite counts as worse than any other.
      coarse: rising positive points, from `linear_grid` or `geometric_grid`.
      maximise: whether larger values are better (a metric) or smaller ones (an output change).
      whole: visit every coarse point: an output change may rise before it falls for good.
      decay: in (0, 1).
    Raises: ValueError for arguments out of range, or if no value is finite.
    Source: DAREx (arXiv:2410.09344), Algorithm 2, with the stopping rule of the authors' code. Unlike there,
      points stay within the coarse grid, and of equal best values the middle is taken, not the first visited.
    """
    rising = all(a < b for a, b in pairwise(coarse))
    if not coarse or not rising or not (coarse[0] > 0.0 and math.isfinite(coarse[-1])):
        raise DarexError(f"a coarse grid is one or more rising positive numbers, got {list(coarse)}.")
    if not 0.0 < decay < 1.0 or refinements < 0 or patience < 0:
        raise DarexError(
            f"need 0 < decay < 1, patience >= 0 and refinements >= 0, "
            f"got decay={decay}, patience={patience}, refinements={refinements}."
        )
    sign = 1.0 if maximise else -1.0
    values: dict[float, float] = {}

    def score(q: float) -> float:
        return sign * values[q] if math.isfinite(values[q]) else -math.inf

    def walk(points: Iterable[float], patience: float) -> None:
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

    def around(centre: float) -> list[float]:
        reach = range(1, math.ceil(1 / decay - 1e-9))
        below, above = [q for q in values if q < centre], [q for q in values if q > centre]
        left = [round(centre - j * decay * (centre - max(below)), 12) for j in reach] if below else []
        right = [round(centre + j * decay * (min(above) - centre), 12) for j in reach] if above else []
        return [*left[::-1], centre, *right]

    walk(coarse, math.inf if whole else patience)
    for _ in range(refinements):
        walk(around(middle(plateau())), patience)
    if not any(math.isfinite(v) for v in values.values()):
        raise DarexError(
            f"the objective is finite at none of the {len(values)} visited q, {coarse[0]} to {coarse[-1]}."
        )
    run = plateau()
    q = middle(run)
    return SearchResult(q, values[q], (run[0], run[-1]), sorted(values.items()))


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean without the value farthest from the mean (the first of equals), as over the masks of seeds 0 to 3.

    Of one or two values nothing is left out. Source: the authors' code for DAREx, Algorithm 2.
    """
    if not values:
        raise DarexError("the mean of no values does not exist.")
    kept = list(values)
    mean = math.fsum(kept) / len(kept)
    if len(kept) > 2 and math.isfinite(mean):
        kept.pop(max(range(len(kept)), key=lambda i: abs(kept[i] - mean)))
    return math.fsum(kept) / len(kept)
