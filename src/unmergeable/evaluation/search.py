"""Where in the plane of two coefficients to look: a coarse grid, then between its best points and their neighbours.

The defended task and the free-rider's pull in different directions, and the best attack lies where the free-rider's
own skill just survives. That place is narrow; a fine grid over everything would spend its time elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from unmergeable.evaluation.by_part import POINTS, next_by_part, spread
from unmergeable.evaluation.cells import Cell
from unmergeable.evaluation.meeting import Enough, never
from unmergeable.evaluation.methods import is_sum, merge_takes_coefficients
from unmergeable.evaluation.plans.audit_plan import Grid
from unmergeable.evaluation.race import Race, Rules, mean_credits
from unmergeable.evaluation.scoring import Coefficients, Group, Scoring
from unmergeable.evaluation.selection import pareto_front

Scores = Mapping[Coefficients, tuple[float, float]]
"""Mean scores on the defended task and on the free-rider's, on validation examples, at each point looked at.

A point is the coefficient of the defended expert, and that of the free-rider's.
"""

Place = Coefficients | None
"""A point, or None for a merge that has no coefficients to choose."""

Propose = Callable[[Scores, float, int], list[Coefficients]]
"""The points to look at next, from what is known, the score that the free-rider must keep, and how many may follow."""

BATCH = 4
"""Points that are proposed at a time; the next ones then know what these scored."""

OUTSIDE = 8
"""Points outside the grid that are looked at, at most, where the best one lies on its edge."""

FARTHEST = 16.0
"""No coefficient is larger."""


@dataclass(frozen=True)
class Found:
    """What a search found, by coefficients.

    Attributes:
        cells: of attacks that met every validation example.
        left: of those that left the race, with the examples they met.
        scores: of all of them, as far as can be told.
        refusal: why the last set of coefficients that was refused was.
    """

    cells: Mapping[Place, Cell]
    left: Mapping[Place, Cell]
    scores: Mapping[Place, tuple[float, float]]
    refusal: str = ""


def search(group: Group, grid: Grid, kept: float, rules: Rules | None, folder: Path) -> Found:
    """Score the coarse grid on validation examples, and refine it where the best attacks are.

    Where merging is cheap all points of the grid meet a first batch, and then the best go on first, each until it has
    met all or is out of the race: no weights are merged more than twice. Otherwise, and in the refinement, one is
    scored after the other, and merged once.

    Args:
        group: the victim and the free-rider's model, or that one alone.
        grid: of coefficients, and how many points refine it.
        kept: the free-rider's score that an attack must keep to count.
        rules: of the race; None where every point meets all examples.
        folder: of the cells.

    Raises:
        BadInput, CheckpointError: as :func:`unmergeable.evaluation.scoring.score_points` does.
    """
    course = _Course(group, kept, rules, folder)
    course.begin(start_points(group, grid))
    for propose, left in _proposals(group, grid):
        while left > 0:
            scores = {point: score for point, score in course.scores.items() if point is not None}
            points = propose(scores, kept, left) if scores else []
            if not points:
                break
            course.add(points)
            left -= len(points)
    course.finish_best()
    return course.found


def glance(group: Group, grid: Grid, folder: Path) -> dict[Place, Cell]:
    """The points that a search begins with, after one batch of validation examples. Raises what it does."""
    scoring = Scoring(group, "validation", folder)
    cells = {point: scoring.cell(point, lambda cell: True) for point in start_points(group, grid)}
    return {point: cell for point, cell in cells.items() if cell is not None}


def _proposals(group: Group, grid: Grid) -> list[tuple[Propose, int]]:
    """How points are found after the first ones, one way after another, and how many each may find."""
    if not takes_coefficients(group):
        return []
    if _is_by_part(group):
        return [(_next_by_part, POINTS)]
    outward = [(points_outside, OUTSIDE)] if grid.extends else []
    return [(next_points, grid.refinements), *outward]


def _next_by_part(scores: Scores, kept: float, left: int) -> list[Coefficients]:
    ranked = sorted(scores, key=lambda point: merit(scores[point], kept), reverse=True)
    return next_by_part(scores, ranked, left, BATCH)


def _is_by_part(group: Group) -> bool:
    return group.merge is not None and bool(group.merge.start)


def merges_cheaply(group: Group) -> bool:
    """Whether weights are added up from what is in memory: that costs less than a batch of examples."""
    merge = group.merge
    return merge is not None and merge.then is None and is_sum(merge.method)


def takes_coefficients(group: Group) -> bool:
    return group.merge is not None and merge_takes_coefficients(group.merge.method, group.merge.settings)


def start_points(group: Group, grid: Grid) -> list[Place]:
    """The coarse grid; without the victim only the free-rider's coefficient counts, that of its own model with it."""
    if not takes_coefficients(group):
        return [None]
    if group.merge is not None and group.merge.start:
        return [spread(group.merge.start)]
    if len(group.models) == 1:
        grid = replace(grid, defended=(0.0,), rider=tuple(sorted({*grid.rider, 1.0})))
    return [*coarse_points(grid)]


def most_points(group: Group, grid: Grid) -> int:
    """How many points a search looks at, at most."""
    return len(start_points(group, grid)) + sum(most for _, most in _proposals(group, grid))


class _Course:
    """A search under way: who is racing, who has met every example, who is out."""

    def __init__(self, group: Group, kept: float, rules: Rules | None, folder: Path) -> None:
        self._scoring = Scoring(group, "validation", folder)
        self._tasks = tuple(task.entry.name for task in group.tasks)
        self._kept = kept
        self._looks_first = merges_cheaply(group)
        self._race = None if rules is None else Race(rules)
        self._cells: dict[Place, Cell] = {}

    def begin(self, points: Sequence[Place]) -> None:
        """Let each of these meet what it takes, the best after a first batch before the others if merging is cheap."""
        if self._race is None or not self._looks_first or len(points) == 1:
            self.add(points)
            return
        for point in points:
            self._meet(point, lambda cell: True)
        waiting = [point for point in points if point in self._cells]
        while waiting:
            best = max(waiting, key=lambda point: merit(self._score(point), self._kept))
            waiting.remove(best)
            self._meet(best)

    def add(self, points: Sequence[Place]) -> None:
        """Let each of these meet examples until it has met all, or is out."""
        for point in points:
            self._meet(point)

    def finish_best(self) -> None:
        """Where all are out the best meets every example all the same, for what is said of this merge."""
        if self._cells and not any(cell.is_whole for cell in self._cells.values()):
            scores = self.scores
            self._meet(max(scores, key=lambda point: merit(scores[point], self._kept)), never)

    def _meet(self, point: Place, enough: Enough | None = None) -> None:
        if enough is None:
            enough = never if self._race is None else self._race.is_out
        cell = self._scoring.cell(point, enough)
        if cell is None:
            return
        if cell.is_whole and self._race is not None:
            self._race.add(cell)
        self._cells[point] = cell

    def _score(self, point: Place) -> tuple[float, float]:
        cell = self._cells[point]
        return mean_credits(cell, *self._tasks) if self._race is None else self._race.estimate(cell)

    @property
    def scores(self) -> dict[Place, tuple[float, float]]:
        return {point: self._score(point) for point in self._cells}

    @property
    def found(self) -> Found:
        whole, left = ({p: c for p, c in self._cells.items() if c.is_whole is is_whole} for is_whole in (True, False))
        return Found(whole, left, self.scores, self._scoring.refusal)


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


def points_outside(scores: Scores, kept: float, left: int) -> list[Coefficients]:
    """Up to ``left`` points beyond the edge of the grid, next to the best point; none where that lies inside.

    Beyond the largest coefficient the next is twice as large, beyond the smallest half as large: at 0 a model is left
    out, and there is nothing beyond. Arguments as for :func:`next_points`.
    """
    best = _ranking(scores, kept)[0]
    proposed = []
    for axis, value in enumerate(best):
        places = {point[axis] for point in scores}
        beyond = [2 * value] if value == max(places) else []
        beyond += [value / 2] if value == min(places) else []
        if len(places) > 1 and value > 0:
            proposed += [(*best[:axis], moved, *best[axis + 1 :]) for moved in beyond if moved <= FARTHEST]
    return [point for point in proposed if point not in scores][:left]


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

    places = []
    for number, scores in enumerate(sweeps):
        ranked = sorted(scores, key=lambda point: merit(scores[point], kept), reverse=True)[:count]
        places += [(place, merit(scores[point], kept), number, point) for place, point in enumerate(ranked)]
    places.sort(key=lambda entry: (entry[0], *(-value for value in entry[1]), entry[2]))
    return [(number, point) for _, _, number, point in places[:count]]


def merit(score: tuple[float, float], kept: float) -> tuple[bool, float]:
    """Orders attacks by their scores on the defended task and on the free-rider's, the worst first."""
    defended, rider = score
    return rider >= kept, defended if rider >= kept else rider


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
