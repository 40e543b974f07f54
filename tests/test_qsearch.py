"""Algorithm 2: which q it visits, where it stops, what it picks."""

import math

import pytest

from darex_jax.q.search import geometric_grid, linear_grid, search_q, trimmed_mean


def visited(objective, *args, **kwargs):
    """The q in the order of their evaluation, and the result."""
    asked: list[float] = []

    def record(q: float) -> float:
        asked.append(q)
        return objective(q)

    return asked, search_q(record, *args, **kwargs)


def test_grids_are_exact_decimals():
    asked, found = visited(lambda q: -abs(q - 0.3), linear_grid(0.1, 0.5, 0.1), maximise=True)
    assert asked[:5] == [0.1, 0.2, 0.3, 0.4, 0.5]  # 0.1 + 2 * 0.1 is not 0.3 without rounding
    # Strictly between the neighbours of 0.3, no second evaluation of 0.3, and 4 worse values end the pass.
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


def test_stops_after_more_than_patience_values_in_a_row_without_improvement():
    asked, _ = visited(lambda q: q, linear_grid(0.1, 0.9, 0.1), maximise=False, refinements=0)
    assert asked == [0.1, 0.2, 0.3, 0.4, 0.5]
    asked, _ = visited(lambda q: q, linear_grid(0.1, 0.9, 0.1), maximise=False, refinements=0, patience=0)
    assert asked == [0.1, 0.2]
    values = iter(
        [5.0, 4.0, 4.0, 4.0, 5.0, 4.0, 4.0, 4.0, 4.0, 9.0]
    )  # a tie with the best starts the count anew
    asked, found = visited(lambda q: next(values), linear_grid(1.0, 10.0, 1.0), maximise=True, refinements=0)
    assert len(asked) == 9 and found.value == 5.0


def test_a_flat_beginning_does_not_end_the_walk():
    asked, found = visited(
        lambda q: 0.5 if q < 0.8 else 0.9, linear_grid(0.1, 0.9, 0.1), maximise=True, refinements=0
    )
    assert len(asked) == 9 and found.q in (0.8, 0.9)


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
    assert asked == [0.01, 0.014, 0.018, 0.022, 0.026][:1]


def test_values_that_are_not_finite_are_never_chosen():
    found = search_q(
        lambda q: math.nan if q < 0.2 else -q, linear_grid(0.1, 0.5, 0.1), maximise=True, refinements=0
    )
    assert found.q == 0.2
    found = search_q(
        lambda q: -math.inf if q < 0.2 else q, linear_grid(0.1, 0.5, 0.1), maximise=False, refinements=0
    )
    assert found.q == 0.2
    with pytest.raises(ValueError, match="the objective is finite at none of the 5 visited q"):
        search_q(lambda q: math.nan, linear_grid(0.1, 0.5, 0.1), maximise=True, refinements=0)


@pytest.mark.parametrize("grid", [(0.0, 0.5, 0.1), (0.5, 0.1, 0.1), (0.1, 0.5, 0.0), (0.1, math.inf, 0.1)])
def test_refuses_a_grid_that_is_none(grid):
    with pytest.raises(ValueError, match="need 0 < low <= high and step > 0, got low="):
        linear_grid(*grid)
    with pytest.raises(ValueError, match="need 0 < decay < 1"):
        search_q(lambda q: q, linear_grid(0.1, 0.5, 0.1), maximise=True, decay=1.0)
    for coarse in ([], [0.2, 0.1], [0.0, 0.1], [0.1, math.inf]):
        with pytest.raises(ValueError, match="one or more rising positive numbers"):
            search_q(lambda q: q, coarse, maximise=True)
    with pytest.raises(ValueError, match="ratio > 1"):
        geometric_grid(0.1, 1.0, 1.0)


def test_a_geometric_grid_reaches_its_end():
    assert geometric_grid(0.01, 0.09, 2.0) == [0.01, 0.02, 0.04, 0.08]
    assert geometric_grid(2**-5, 2**5, 2.0)[-1] == 32.0
    assert geometric_grid(0.001, 1.0)[:4] == [0.001, 0.001414, 0.002, 0.002828]
    assert geometric_grid(0.7, 1.0) == [0.7, 0.9899] and geometric_grid(1.0, 1.0) == [1.0]


def test_a_whole_coarse_grid_survives_a_hump():
    """The output change at 0.999 rises before it falls: the authors' rule ends before its best point."""

    def hump(q):
        return {0.001: 0.62, 0.002: 0.64, 0.004: 0.65, 0.008: 0.66, 0.016: 0.67, 0.032: 0.5}.get(q, 0.6)

    coarse = geometric_grid(0.001, 0.128, 2.0)
    assert search_q(hump, coarse, maximise=False, refinements=0).q == 0.001
    asked, found = visited(hump, coarse, maximise=False, whole=True)
    assert found.q == 0.032 and asked[:8] == coarse
    # A tenth of the distance to each neighbour apart; four worse values above end the pass.
    assert asked[8:] == [0.0176, 0.0192, 0.0208, 0.0224, 0.024, 0.0256, 0.0272, 0.0288, 0.0304,
                         0.0352, 0.0384, 0.0416, 0.0448]  # fmt: skip


def test_trimmed_mean_leaves_the_farthest_out():
    assert trimmed_mean([1.0, 2.0, 3.0, 100.0]) == 2.0
    assert trimmed_mean([0.0, 4.0]) == 2.0 and trimmed_mean([7.0]) == 7.0
    with pytest.raises(ValueError, match="the mean of no values"):
        trimmed_mean([])
