"""The search finds a narrow best place with a budget that a grid over everything would spend elsewhere."""

from __future__ import annotations

import pytest

from unmergeable.evaluation.plans.audit_plan import Grid
from unmergeable.evaluation.search import best_starts, coarse_points, next_points

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
