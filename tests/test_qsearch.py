"""Algorithm 2: which q it visits, where it stops, what it chooses."""

import math

import numpy as np
import pytest

from darex_jax.q.search import authors_walk, geometric_grid, linear_grid, search_q, trimmed_mean


def visited(objective, *args, **kwargs):
    """The visited q in order, and the result."""
    asked: list[float] = []

    def record(q: float) -> float:
        asked.append(q)
        return objective(q)

    return asked, search_q(record, *args, **kwargs)


def test_grids_are_exact_decimals():
    asked, found = visited(lambda q: -abs(q - 0.3), linear_grid(0.1, 0.5, 0.1), maximise=True)
    assert asked[:5] == [0.1, 0.2, 0.3, 0.4, 0.5]  # 0.1 + 2 * 0.1 is not 0.3 without rounding
    # Strictly between the neighbours of 0.3, 0.3 is not evaluated again, and 4 worse values end the pass.
    assert asked[5:] == [0.21, 0.22, 0.23, 0.24, 0.25, 0.26, 0.27, 0.28, 0.29, 0.31, 0.32, 0.33, 0.34]
    assert (found.q, found.value, found.plateau) == (0.3, 0.0, (0.3, 0.3))
    assert [q for q, _ in found.curve] == sorted(asked)


def test_finds_an_optimum_between_coarse_points():
    for sign, maximise in ((-1.0, True), (1.0, False)):
        found = search_q(
            lambda q, s=sign: s * (q - 0.137) ** 2, linear_grid(0.05, 0.5, 0.05), maximise=maximise
        )
        assert found.q == 0.135
        finer = search_q(
            lambda q, s=sign: s * (q - 0.137) ** 2,
            linear_grid(0.05, 0.5, 0.05),
            maximise=maximise,
            refinements=2,
        )
        assert finer.q == 0.137


def test_a_refinement_ends_after_more_than_patience_values_in_a_row_without_improvement():
    grid = linear_grid(1.0, 4.0, 1.0)
    asked, _ = visited(lambda q: -q, grid, maximise=True)
    assert asked == [1.0, 2.0, 3.0, 4.0, 1.1, 1.2, 1.3, 1.4]
    asked, _ = visited(lambda q: -q, grid, maximise=True, patience=0)
    assert asked == [1.0, 2.0, 3.0, 4.0, 1.1]
    values = {1.0: 5.0, 1.1: 3.0, 1.2: 3.0, 1.3: 5.0}  # a tie with the best resets the count
    asked, found = visited(lambda q: values.get(q, 4.0), grid, maximise=True)
    assert asked[4:] == [1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7] and found.value == 5.0


def test_the_whole_coarse_grid_is_visited_before_a_refinement():
    asked, found = visited(
        lambda q: 0.5 if q < 0.8 else 0.9, linear_grid(0.1, 0.9, 0.1), maximise=True, refinements=0
    )
    assert len(asked) == 9 and found.q in (0.8, 0.9)


def test_a_flat_objective_keeps_the_first_point_and_is_reported():
    found = search_q(lambda q: 0.4, geometric_grid(0.01, 1.0), maximise=True)
    assert found.flat and found.q == 0.01 and found.plateau == (0.01, 1.0)
    # Non-finite values are skipped, even at DARE's own point: the next one is kept.
    found = search_q(lambda q: math.nan if q < 0.02 else 0.4, geometric_grid(0.01, 1.0), maximise=True)
    assert found.flat and found.q == pytest.approx(0.02, abs=1e-3)
    assert not search_q(lambda q: float(q > 0.9), geometric_grid(0.01, 1.0), maximise=True).flat
    assert not search_q(lambda q: 1.0, [0.5], maximise=True).flat  # one point is no plateau
    assert authors_walk(lambda q: 0.4, (0.01, 0.1, 0.05), maximise=True).flat


def test_plateau_is_reported_and_its_middle_chosen():
    found = search_q(
        lambda q: float(0.3 <= q <= 0.7), linear_grid(0.1, 1.0, 0.1), maximise=True, refinements=0
    )
    assert found.plateau == (0.3, 0.7) and found.q == 0.5
    # Two separate runs of best values: the longer one.
    found = search_q(
        lambda q: float(q in (0.1, 0.4, 0.5, 0.6)), linear_grid(0.1, 1.0, 0.1), maximise=True, refinements=0
    )
    assert found.plateau == (0.4, 0.6) and found.q == 0.5


def test_stays_within_the_bounds():
    asked, found = visited(lambda q: q, linear_grid(0.01, 0.1, 0.04), maximise=True)
    assert asked[:3] == [0.01, 0.05, 0.09] and max(asked) == found.q == 0.09
    asked, _ = visited(lambda q: -q, linear_grid(0.01, 0.01, 0.04), maximise=True)
    assert asked == [0.01]


def test_values_that_are_not_finite_are_never_chosen():
    found = search_q(
        lambda q: math.nan if q < 0.2 else -q, linear_grid(0.1, 0.5, 0.1), maximise=True, refinements=0
    )
    assert found.q == 0.2
    found = search_q(
        lambda q: -math.inf if q < 0.2 else q, linear_grid(0.1, 0.5, 0.1), maximise=False, refinements=0
    )
    assert found.q == 0.2
    # Skipped: a series of them does not end a walk and is no improvement either.
    gap = {0.12: 3.0, 0.19: 4.0}
    asked, found = visited(lambda q: 2.0 if q == 0.1 else gap.get(q, math.nan), [0.1, 0.2], maximise=True)
    assert found.q == 0.19 and len(asked) == 11
    with pytest.raises(ValueError, match="the objective is finite at none of the 5 visited q"):
        search_q(lambda q: math.nan, linear_grid(0.1, 0.5, 0.1), maximise=True, refinements=0)


@pytest.mark.parametrize("grid", [(0.0, 0.5, 0.1), (0.5, 0.1, 0.1), (0.1, 0.5, 0.0), (0.1, math.inf, 0.1)])
def test_invalid_grids_are_refused(grid):
    with pytest.raises(ValueError, match="need 0 < low <= high and step > 0, got low="):
        linear_grid(*grid)
    with pytest.raises(ValueError, match="need 0 < decay < 1"):
        search_q(lambda q: q, linear_grid(0.1, 0.5, 0.1), maximise=True, decay=1.0)
    for coarse in ([], [0.2, 0.1], [0.0, 0.1], [0.1, math.inf]):
        with pytest.raises(ValueError, match="one or more increasing positive numbers"):
            search_q(lambda q: q, coarse, maximise=True)
    for wrong in ((0.1, 1.0, 1.0), (0.0, 1.0), (1.0, 0.1), (0.1, math.inf), (0.1, 1.0, math.inf)):
        with pytest.raises(ValueError, match="need 0 < low <= high and ratio > 1"):
            geometric_grid(*wrong)


def test_a_linear_grid_has_twelve_digits():
    assert linear_grid(1e-12, 3e-12, 1e-12) == [1e-12, 2e-12, 3e-12]


def test_a_geometric_grid_reaches_its_end():
    assert geometric_grid(0.01, 0.09, 2.0) == [0.01, 0.02, 0.04, 0.08, 0.09]
    assert geometric_grid(2**-5, 2**5, 2.0)[-1] == 32.0
    assert geometric_grid(0.001, 1.0)[:4] == [0.001, 0.001414, 0.002, 0.002828]
    assert geometric_grid(0.12346, 0.3, 2.0) == [0.12346, 0.2469, 0.3]  # its first point is not rounded
    assert geometric_grid(0.7, 1.0) == [0.7, 0.9899, 1.0] and geometric_grid(1.0, 1.0) == [1.0]
    for low in (0.1, 0.5, 0.01, 0.001, 0.125, 0.99999, 2.0**-30):
        grid = geometric_grid(low, 1.0)
        assert grid[0] == low and grid[-1] == 1.0 and grid == sorted(set(grid))


def test_a_whole_coarse_grid_survives_a_hump():
    """The output change at 0.999 rises before it falls: the authors' rule stops before the best point."""

    def hump(q):
        values = {0.001: 0.62, 0.002: 0.64, 0.004: 0.65, 0.008: 0.66, 0.016: 0.67, 0.032: 0.5}
        return values.get(q, 0.68 if q < 0.02 else 0.6)

    coarse = geometric_grid(0.001, 0.128, 2.0)
    assert authors_walk(hump, (0.001, 0.128, 0.001), maximise=False).q == 0.001
    asked, found = visited(hump, coarse, maximise=False)
    assert found.q == 0.032 and asked[:8] == coarse
    # Spaced by a tenth of the distance to each neighbour; four worse values above end the pass.
    assert asked[8:] == [0.0176, 0.0192, 0.0208, 0.0224, 0.024, 0.0256, 0.0272, 0.0288, 0.0304,
                         0.0352, 0.0384, 0.0416, 0.0448]  # fmt: skip


# The authors' walk.


def published(objective, l_bound, u_bound, step, decay=0.1):
    """`find_optimal_param` of the authors' find_q_encoder.py: visited points, and the result."""
    best_scores, asked = {}, []
    best_score, stop_id = -np.inf, 0
    for initial in np.arange(l_bound, u_bound + step, step):
        asked.append(initial)
        best_scores[initial] = score = objective(initial)
        best_score, stop_id = (score, 0) if score >= best_score else (best_score, stop_id + 1)
        if stop_id > 3:
            break
    best = sorted(best_scores.items(), key=lambda x: x[1], reverse=True)[0][0]
    l_bound, u_bound = max(l_bound + step * decay, best - step * (1 - decay)), best + step
    best_score, stop_id = -np.inf, 0
    for initial in np.arange(l_bound, u_bound, step * decay):
        asked.append(initial)
        best_scores[initial] = score = objective(initial)
        best_score, stop_id = (score, 0) if score >= best_score else (best_score, stop_id + 1)
        if stop_id > 3:
            break
    return asked, sorted(best_scores.items(), key=lambda x: x[1], reverse=True)[0][0]


def both_walks(objective, grid, maximise=True):
    """Asserts that ours visits and finds the same as the published walk; returns both."""
    asked, found = [], None

    def ours(q):
        asked.append(q)
        return objective(q)

    found = authors_walk(ours, grid, maximise=maximise)
    sign = 1.0 if maximise else -1.0
    theirs, best = published(lambda q: sign * objective(round(q, 12)), *grid)
    assert asked == list(dict.fromkeys(round(q, 12) for q in theirs))  # ours evaluates no q twice
    assert found.q == round(best, 12) and found.value == objective(found.q)
    assert found.plateau[0] <= found.q <= found.plateau[1]
    return asked, found.q


def test_the_walk_of_the_readmes_bounds_goes_beyond_them():
    asked, best = both_walks(lambda q: q, (0.01, 0.1, 0.05))
    assert asked[:3] == [0.01, 0.06, 0.11] and asked[3] == 0.065 and best == max(asked) == 0.155
    asked, best = both_walks(lambda q: -q, (0.01, 0.1, 0.05))
    assert asked[3:] == [0.015, 0.02, 0.025, 0.03, 0.035] and best == 0.01
    assert both_walks(lambda q: 0.5, (0.01, 0.1, 0.05))[1] == 0.01  # the first of equals


def test_the_walk_stops_after_more_than_three_values_in_a_row_without_improvement():
    asked, best = both_walks(lambda q: -q, (0.1, 0.9, 0.1))
    assert asked[:5] == [0.1, 0.2, 0.3, 0.4, 0.5] and best == 0.1
    values = iter([5.0, 4.0, 4.0, 4.0, 5.0, 4.0, 4.0, 4.0, 4.0, *[0.0] * 9])  # a tie resets the count
    assert len([q for q, v in authors_walk(lambda q: next(values), (1.0, 10.0, 1.0), maximise=True).curve
                if v >= 4.0]) == 9  # fmt: skip


@pytest.mark.parametrize("grid", [(0.01, 0.1, 0.05), (0.1, 0.5, 0.1), (0.3, 0.7, 0.1), (0.01, 0.1, 0.01),
                                  (0.05, 1.0, 0.07), (0.001, 0.001, 0.05)])  # fmt: skip
@pytest.mark.parametrize("maximise", [True, False])
def test_the_walk_is_the_published_one(grid, maximise):
    """For objectives with one peak, inside and outside of the bounds: smooth, stepped, and noisy."""
    low, high, step = grid
    rng = np.random.default_rng(int(1000 * high))
    sign = 1.0 if maximise else -1.0
    for _ in range(60):
        peak, steps = rng.uniform(low - step, high + 2 * step), rng.integers(3, 40)
        seed = int(rng.integers(2**32))

        def smooth(q, peak=peak):
            return -sign * abs(q - peak)

        def coarse(q, peak=peak, steps=steps):
            return -sign * round(abs(q - peak) * steps) / steps

        def noisy(q, seed=seed):
            return float(np.random.default_rng([seed, round(q * 1e12)]).integers(0, 9))

        for objective in (smooth, coarse, noisy):
            both_walks(objective, grid, maximise)


def test_the_walk_passes_over_what_is_not_finite():
    found = authors_walk(lambda q: -q if q > 0.55 else math.nan, (0.1, 0.9, 0.1), maximise=True)
    assert found.q == 0.56  # five in a row do not end the walk
    with pytest.raises(ValueError, match="finite at none of the 9 visited q"):
        authors_walk(lambda q: math.nan, (0.1, 0.9, 0.1), maximise=True)
    with pytest.raises(ValueError, match="need 0 < low <= high"):
        authors_walk(lambda q: q, (0.9, 0.1, 0.1), maximise=True)


def test_trimmed_mean_leaves_the_farthest_out():
    assert trimmed_mean([1.0, 2.0, 3.0, 100.0]) == 2.0
    assert trimmed_mean([0.0, 4.0]) == 2.0 and trimmed_mean([7.0]) == 7.0
    with pytest.raises(ValueError, match="at least one value"):
        trimmed_mean([])
