"""Grid searches for one q, coarse then fine: our own, and Algorithm 2 of DAREx."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from darex_jax.core.errors import DarexError

PATIENCE = 3  # consecutive values without improvement after which a pass still continues


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
      q: the chosen point.
      value: the objective at q.
      plateau: first and last of the adjacent visited points that share the best value; (q, q) if there is
        only one.
      curve: every visited (q, value), by increasing q; values may be NaN or infinite.
    """

    q: float
    value: float
    plateau: tuple[float, float]
    curve: list[tuple[float, float]]

    @property
    def flat(self) -> bool:
        """Whether several points were visited and all finite values are equal."""
        return len(self.curve) > 1 and len({v for _, v in self.curve if math.isfinite(v)}) == 1


def linear_grid(low: float, high: float, step: float) -> list[float]:
    """low, low + step, ... up to `high`, inclusive if it is on the grid.

    Points are computed from their index and rounded to 12 digits, so that they are the same everywhere.
    Raises: ValueError for an invalid grid.
    """
    check_bounds(low, high, step)
    return [round(low + i * step, 12) for i in range(math.floor((high - low) / step + 1e-9) + 1)]


def geometric_grid(low: float, high: float, ratio: float = math.sqrt(2.0)) -> list[float]:
    """low, low * ratio, low * ratio^2, ... and `high` itself; all between rounded to 4 significant digits.

    Raises: ValueError for an invalid grid.
    """
    if not (0.0 < low <= high < math.inf and 1.0 < ratio < math.inf):
        raise DarexError(f"need 0 < low <= high and ratio > 1, got low={low}, high={high}, ratio={ratio}.")
    count = math.ceil(math.log(high / low) / math.log(ratio) - 1e-9)
    between = [float(f"{low * ratio**i:.4g}") for i in range(1, count)]
    return [low, *(q for q in between if low < q < high), *([high] if high > low else [])]


def check_bounds(low: float, high: float, step: float) -> None:
    """Raises: ValueError unless these define a grid."""
    if not (0.0 < low <= high < math.inf and 0.0 < step < math.inf):
        raise DarexError(f"need 0 < low <= high and step > 0, got low={low}, high={high}, step={step}.")


def search_q(
    objective: Callable[[float], float],
    coarse: Sequence[float],
    *,
    maximise: bool,
    patience: int = PATIENCE,
    decay: float = 0.1,
    refinements: int = 1,
) -> SearchResult:
    """Visits a whole coarse grid, then finer ones around the best point.

    The coarse pass never stops early, since an output change may rise before it falls. A refinement visits
    points strictly between the best point's neighbours, `decay` times the distance to each apart, and stops
    after more than `patience` consecutive values worse than its best; ties are not worse. Among equal best
    values the middle one is chosen, or the first if all values are equal. No q is evaluated twice.

    Args:
      objective: q -> value; non-finite values are skipped.
      coarse: increasing positive points, from `linear_grid` or `geometric_grid`.
      maximise: whether larger values are better (a metric) or smaller ones (an output change).
      decay: in (0, 1).
    Raises: ValueError for arguments out of range, or if no value is finite.
    Source: after DAREx (arXiv:2410.09344), Algorithm 2, which is `authors_walk`.
    """
    rising = all(a < b for a, b in pairwise(coarse))
    if not coarse or not rising or not (coarse[0] > 0.0 and math.isfinite(coarse[-1])):
        raise DarexError(f"a coarse grid is one or more increasing positive numbers, got {list(coarse)}.")
    if not 0.0 < decay < 1.0 or refinements < 0 or patience < 0:
        raise DarexError(
            f"need 0 < decay < 1, patience >= 0 and refinements >= 0, "
            f"got decay={decay}, patience={patience}, refinements={refinements}."
        )
    visits = _Visits(objective, maximise)

    def around(centre: float) -> list[float]:
        reach = range(1, math.ceil(1 / decay - 1e-9))
        below, above = [q for q in visits.values if q < centre], [q for q in visits.values if q > centre]
        left = [round(centre - j * decay * (centre - max(below)), 12) for j in reach] if below else []
        right = [round(centre + j * decay * (min(above) - centre), 12) for j in reach] if above else []
        return [*left[::-1], centre, *right]

    visits.walk(coarse, math.inf)
    for _ in range(refinements):
        visits.walk(around(_middle(visits.longest_plateau())), patience)
    run = visits.longest_plateau()
    result = visits.result(_middle(run), run)
    return visits.result(run[0], run) if result.flat else result


def authors_walk(
    objective: Callable[[float], float], grid: tuple[float, float, float], *, maximise: bool
) -> SearchResult:
    """The search of the authors' code, point by point.

    A coarse pass visits low, low + step, ..., with one point beyond `high` if `high` is not on the grid. A
    fine pass, in steps of a tenth, visits from 0.9 step below the best point, but above `low`, to one step
    above it, even beyond `high`. Both stop after more than 3 consecutive values without improvement, ties
    included as improvement. Among equal best values the first visited is chosen.

    Args:
      objective, maximise: as for `search_q`.
      grid: low, high and step.
    Raises: ValueError for an invalid grid, or if no value is finite.
    Source: `find_optimal_param` of find_q_encoder.py in the authors' code for DAREx, arXiv:2410.09344. That
      of find_q_decoder.py also refines below `low`, down to 0, which is not a valid divisor. Unlike there, no
      q is evaluated twice, points are rounded to 12 digits, and non-finite values are skipped instead of
      counting as no improvement.
    """
    low, high, step = grid
    check_bounds(low, high, step)
    decay = 0.1
    visits = _Visits(objective, maximise)
    # np.arange on the same unrounded bounds: the number of points depends on the last bit.
    coarse = np.arange(low, high + step, step).tolist()
    visits.walk([round(q, 12) for q in coarse], PATIENCE)
    best = next(q for q in coarse if round(q, 12) == visits.first_best())
    fine = np.arange(max(low + step * decay, best - step * (1 - decay)), best + step, step * decay).tolist()
    visits.walk([round(q, 12) for q in fine], PATIENCE)
    q = visits.first_best()
    return visits.result(q, next(run for run in visits.plateaus() if q in run))


class _Visits:
    """The objective at every visited q, in order of visits."""

    def __init__(self, objective: Callable[[float], float], maximise: bool):
        self.objective = objective
        self.sign = 1.0 if maximise else -1.0
        self.values: dict[float, float] = {}

    def walk(self, points: Iterable[float], patience: float) -> None:
        """Visits points until more than `patience` consecutive ones are worse than the best of this walk."""
        best, worse_in_a_row = -math.inf, 0
        for q in points:
            if q not in self.values:
                self.values[q] = float(self.objective(q))
            if not math.isfinite(self.values[q]):
                continue
            if self.score(q) >= best:
                best, worse_in_a_row = self.score(q), 0
            else:
                worse_in_a_row += 1
            if worse_in_a_row > patience:
                return

    def score(self, q: float) -> float:
        return self.sign * self.values[q] if math.isfinite(self.values[q]) else -math.inf

    def first_best(self) -> float:
        """The best q; ties give the first visited. Raises: ValueError if no value is finite."""
        best = max(self.values, key=self.score)
        if not math.isfinite(self.values[best]):
            raise DarexError(
                f"the objective is finite at none of the {len(self.values)} visited q, "
                f"{min(self.values)} to {max(self.values)}: are the outputs of base and fine-tuned model "
                "finite on these examples?"
            )
        return best

    def longest_plateau(self) -> list[float]:
        """The longest plateau; ties give the first."""
        return max(self.plateaus(), key=len)

    def plateaus(self) -> list[list[float]]:
        """The runs of neighbouring visited points with the best value; some may be empty."""
        best = self.score(self.first_best())
        runs: list[list[float]] = [[]]
        for q in sorted(self.values):
            if self.score(q) == best:
                runs[-1].append(q)
            else:
                runs.append([])
        return runs

    def result(self, q: float, run: Sequence[float]) -> SearchResult:
        return SearchResult(q, self.values[q], (run[0], run[-1]), sorted(self.values.items()))


def _middle(run: Sequence[float]) -> float:
    return min(run, key=lambda q: (round(abs(q - (run[0] + run[-1]) / 2), 12), q))


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean without the value farthest from the mean (ties drop the first), as over the masks of seeds 0 to 3.

    One or two values are averaged as they are. Source: the authors' code for DAREx, Algorithm 2.
    """
    if not values:
        raise DarexError("trimmed_mean needs at least one value.")
    kept = list(values)
    mean = math.fsum(kept) / len(kept)
    if len(kept) > 2 and math.isfinite(mean):
        kept.pop(max(range(len(kept)), key=lambda i: abs(kept[i] - mean)))
    return math.fsum(kept) / len(kept)
