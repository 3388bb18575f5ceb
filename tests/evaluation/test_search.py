"""The search finds a narrow best place with a budget that a grid over everything would spend elsewhere."""

from __future__ import annotations

import math

import pytest

from unmergeable.evaluation.plans.audit_plan import Grid
from unmergeable.evaluation.search import FARTHEST, best_starts, coarse_points, next_points, points_outside

Point = tuple[float, ...]


def scores_at(point: Point, best: Point) -> tuple[float, float]:
    """A hill for the defended task, and a free-rider's skill that survives on one side of a line through its top."""
    distance = ((point[0] - best[0]) ** 2 + (point[1] - best[1]) ** 2) ** 0.5
    return 1 - distance, 1.0 if point[0] - point[1] <= best[0] - best[1] + 1e-9 else 0.0


@pytest.mark.parametrize("best", [(0.6, 0.9), (1.1, 0.35), (0.3, 0.3), (1.4, 1.4)])
def test_refining_halves_the_distance_to_the_best_place(best: Point) -> None:
    coarse = coarse_points(Grid())
    scored = {point: scores_at(point, best) for point in coarse}

    def reached() -> float:
        return max(defended for defended, rider in scored.values() if rider >= 0.95)

    before = 1 - reached()
    left = 24
    while left and (points := next_points(scored, 0.95, left)):
        assert len(points) <= left
        assert not set(points) & set(scored), "nothing is looked at twice"
        scored |= {point: scores_at(point, best) for point in points}
        left -= len(points)
    assert 1 - reached() <= before / 2


def test_it_ends_where_there_is_nothing_between() -> None:
    assert next_points({(1.0, 1.0): (0.5, 0.5)}, 0.4, 8) == []
    assert next_points({(1.0, 1.0): (0.5, 0.5), (0.0, 1.0): (0.1, 0.9)}, 0.4, 0) == []


def test_without_an_attack_that_counts_it_looks_where_one_nearly_does() -> None:
    scored = {(0.0, 0.0): (0.0, 0.1), (1.0, 0.0): (0.9, 0.2), (0.0, 1.0): (0.1, 0.8), (1.0, 1.0): (0.5, 0.5)}
    assert next_points(scored, 0.95, 2) == [(0.5, 1.0), (0.0, 0.5)]


def test_starts_are_the_best_of_every_sweep_first() -> None:
    a, b, c, d = (0.5, 1.0), (1.0, 1.0), (1.5, 1.0), (0.0, 1.0)
    sweeps = [{a: (0.9, 0.96), b: (0.8, 0.96), c: (0.99, 0.5)}, {a: (0.5, 0.97), d: (0.6, 0.97)}, {b: (1.0, 0.9)}]
    assert best_starts(sweeps, 0.95, 4) == [(0, a), (1, d), (2, b), (0, b)]
    assert best_starts(sweeps, 0.95, 2) == [(0, a), (1, d)]
    assert best_starts([{}], 0.95, 2) == []


def test_every_second_start_has_skill_to_spare() -> None:
    limit, spare, most = (1.0, 0.5), (0.8, 0.6), (0.0, 1.0)
    sweeps = [{limit: (0.9, 0.85), spare: (0.8, 0.88), most: (0.4, 0.9)}]
    assert best_starts(sweeps, 0.85, 1) == [(0, limit)]
    assert best_starts(sweeps, 0.85, 2) == [(0, limit), (0, spare)]
    assert best_starts(sweeps, 0.85, 3) == [(0, limit), (0, spare), (0, most)]
    # Control: where the best has skill to spare itself, it is followed by the next best.
    assert best_starts([{limit: (0.9, 0.9), spare: (0.8, 0.88)}], 0.85, 2) == [(0, limit), (0, spare)]


@pytest.mark.parametrize("best", [(6.0, 1.0), (0.05, 0.6), (1.0, 5.0), (3.0, 3.0)])
def test_an_optimum_outside_the_grid_is_reached(best: Point) -> None:
    """Within a factor of two of where it lies; a search that stays on the grid ends on its edge."""
    scored = {point: peak(point, best) for point in coarse_points(Grid())}
    inside = max(scored, key=lambda point: scored[point])
    left = 8
    while left and (points := points_outside(scored, 0.9, left)):
        assert not set(points) & set(scored)
        assert all(0 < value <= FARTHEST for point in points for value in point if value not in Grid().rider)
        scored |= {point: peak(point, best) for point in points}
        left -= len(points)
    reached = max(scored, key=lambda point: scored[point])
    for axis in (0, 1):
        assert reached[axis] <= 2 * best[axis]
    assert scored[reached] > scored[inside]


def peak(point: Point, best: Point) -> tuple[float, float]:
    """Highest at the best point, and falling with the ratio of each coefficient to it."""
    distance = sum(abs(math.log(max(value, 1e-3) / wanted)) for value, wanted in zip(point, best, strict=True))
    return 1 / (1 + distance), 1.0


def test_an_optimum_inside_the_grid_leaves_it_alone() -> None:
    scored = {point: peak(point, (0.5, 0.5)) for point in coarse_points(Grid())}
    assert points_outside(scored, 0.9, 8) == []
    # A coefficient of 0 leaves a model out: nothing lies beyond.
    assert points_outside({(1.0, 0.0): (0.9, 1.0), (0.5, 0.0): (0.1, 1.0), (2.0, 1.0): (0.1, 1.0)}, 0.9, 8) == []
    assert points_outside({(1.0, 0.0): (0.9, 1.0), (0.5, 1.0): (0.1, 1.0)}, 0.9, 8) == [(2.0, 0.0)]
