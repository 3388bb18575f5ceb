"""Where in the plane of two coefficients to look: a coarse grid, then between its best points and their neighbours.

The defended task and the free-rider's pull in different directions, and the best attack lies where the free-rider's
own skill just survives. That place is narrow; a fine grid over everything would spend its time elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TypeVar

from unmergeable.evaluation.cells import Cell
from unmergeable.evaluation.methods import merge_takes_coefficients
from unmergeable.evaluation.plans.audit_plan import Grid
from unmergeable.evaluation.scoring import Coefficients, Group, Outcome, score_points
from unmergeable.evaluation.selection import pareto_front

Scores = Mapping[Coefficients, tuple[float, float]]
"""Mean scores on the defended task and on the free-rider's, on validation examples, at each point looked at.

A point is the coefficient of the defended expert, and that of the free-rider's.
"""

Place = TypeVar("Place", bound=Coefficients | None)
"""A point, or None for a merge that has no coefficients to choose."""

BATCH = 4
"""Points that are proposed at a time; the next ones then know what these scored."""


def search(group: Group, grid: Grid, kept: float, folder: Path) -> Outcome:
    """Score the coarse grid on validation examples, and refine it where the best attacks are.

    Args:
        group: the victim and the free-rider's model, or that one alone.
        grid: of coefficients, and how many points refine it.
        kept: the free-rider's score that an attack must keep to count.
        folder: of the cells.

    Raises:
        BadInput, CheckpointError: as :func:`unmergeable.evaluation.scoring.score_points` does.
    """
    if group.merge is None or not merge_takes_coefficients(group.merge.method, group.merge.settings):
        return score_points(group, [None], "validation", folder)
    if len(group.models) == 1:  # without the victim only the free-rider's coefficient counts, its own model among them
        grid = replace(grid, defended=(0.0,), rider=tuple(sorted({*grid.rider, 1.0})))
    outcome = score_points(group, coarse_points(grid), "validation", folder)
    left = grid.refinements
    while left > 0:
        scores = {point: score for point, score in mean_scores(group, outcome.cells).items() if point is not None}
        points = next_points(scores, kept, left) if scores else []
        if not points:
            break
        more = score_points(group, points, "validation", folder)
        outcome = Outcome({**outcome.cells, **more.cells}, more.refusal or outcome.refusal)
        left -= len(points)
    return outcome


def mean_scores(group: Group, cells: Mapping[Place, Cell]) -> dict[Place, tuple[float, float]]:
    """On the defended task and on the free-rider's."""
    defended, rider = (task.entry.name for task in group.tasks)
    return {
        point: (float(cell.credits[defended].mean()), float(cell.credits[rider].mean()))
        for point, cell in cells.items()
    }


def coarse_points(grid: Grid) -> list[Coefficients]:
    return list(product(grid.defended, grid.rider))


def next_points(scores: Scores, kept: float, left: int) -> list[Coefficients]:
    """Up to ``BATCH`` of the ``left`` points to look at next; none when there is nothing between the best ones.

    Args:
        scores: what is known.
        kept: the free-rider's score that an attack must keep to count.
        left: how many points may still be looked at.
    """
    wanted = min(left, BATCH)
    proposed: dict[Coefficients, None] = {}
    for point in _ranking(scores, kept):
        for middle in _middles(point, scores):
            if len(proposed) == wanted:
                return list(proposed)
            if middle not in scores:
                proposed[middle] = None
    return list(proposed)


def best_starts(
    sweeps: Sequence[Mapping[Place, tuple[float, float]]], kept: float, count: int
) -> list[tuple[int, Place]]:
    """Where training is worth most: up to ``count`` points, each with the number of its sweep.

    Every second one has some of the free-rider's skill to spare, half of what can be had above ``kept``: training costs
    some of it, and what starts at the limit may end below.

    Args:
        sweeps: mean credits on the defended task and on the free-rider's, on validation examples, at each point.
        kept: the free-rider's score that an attack must keep to count.
        count: how many.
    """
    most = max((rider for scores in sweeps for _, rider in scores.values()), default=kept)
    at_the_limit = _best_points(sweeps, kept, count)
    with_spare = _best_points(sweeps, max(kept, (kept + most) / 2), count)
    by_turns = (point for pair in zip(at_the_limit, with_spare, strict=True) for point in pair)
    return list(dict.fromkeys(by_turns))[:count]


def _best_points(
    sweeps: Sequence[Mapping[Place, tuple[float, float]]], kept: float, count: int
) -> list[tuple[int, Place]]:
    """The best of every sweep, then the second best, and so on, so that several methods are among them.

    Among points that count the defended task decides, among those that do not what is left of the free-rider's skill.
    """

    def merit(score: tuple[float, float]) -> tuple[bool, float]:
        defended, rider = score
        return rider >= kept, defended if rider >= kept else rider

    places = []
    for number, scores in enumerate(sweeps):
        ranked = sorted(scores, key=lambda point: merit(scores[point]), reverse=True)[:count]
        places += [(place, merit(scores[point]), number, point) for place, point in enumerate(ranked)]
    places.sort(key=lambda entry: (entry[0], *(-value for value in entry[1]), entry[2]))
    return [(number, point) for _, _, number, point in places[:count]]


def _ranking(scores: Scores, kept: float) -> list[Coefficients]:
    """The points that count, best first; then those of the Pareto front that nearly do."""
    counting = sorted((p for p in scores if scores[p][1] >= kept), key=lambda p: (-scores[p][0], p))
    points = list(scores)
    front = [points[n] for n in pareto_front([scores[p][0] for p in points], [scores[p][1] for p in points])]
    nearly = sorted((p for p in front if scores[p][1] < kept), key=lambda p: (-scores[p][1], p))
    return [*counting[:1], *nearly[:1], *counting[1:], *nearly[1:]]


def _middles(point: Coefficients, scores: Scores) -> Iterator[Coefficients]:
    """Halfway to the neighbours of a point on the two axes."""
    for axis in (0, 1):
        places = sorted({other[axis] for other in scores})
        at = bisect_left(places, point[axis])
        for neighbour in (at - 1, at + 1):
            if 0 <= neighbour < len(places):
                middle = (point[axis] + places[neighbour]) / 2
                yield (middle, point[1]) if axis == 0 else (point[0], middle)
