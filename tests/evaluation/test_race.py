"""Attacks race: the choice is not dropped more often than is promised, and the hopeless leave early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmergeable.evaluation import search as searching
from unmergeable.evaluation.cells import Cell, CellStore
from unmergeable.evaluation.meeting import meet, never
from unmergeable.evaluation.plans.audit_plan import Grid
from unmergeable.evaluation.plans.entries import MergeEntry
from unmergeable.evaluation.race import BATCHES, Race, Rules, capital
from unmergeable.evaluation.search import Found, search
from unmergeable.evaluation.selection import choice, skill_to_keep

EXAMPLES = 200
POINTS = [(float(x), float(y)) for x in range(6) for y in range(4)]
GRID = Grid(tuple(map(float, range(6))), tuple(map(float, range(4))), refinements=0)

Table = dict[tuple[float, ...], dict[str, np.ndarray]]
"""Credits of every point by task, [examples]."""


def cell(defended: np.ndarray, rider: np.ndarray) -> Cell:
    return Cell({}, {"defended": defended, "rider": rider}, 0.0)


def credited(share: float, generator: np.random.Generator) -> np.ndarray:
    return (generator.random(EXAMPLES) < share).astype(float)


class Scored:
    """Credits that are known, in place of a network; counts merges, and the examples that were met."""

    met = merged = 0
    refusal = ""

    def __init__(self, table: Table, *_: Any) -> None:
        self._table = table
        self._met: dict[Any, int] = dict.fromkeys(table, 0)

    def cell(self, point: Any, enough: Callable[[Cell], bool] = never) -> Cell:
        whole = cell(self._table[point]["defended"], self._table[point]["rider"])
        Scored.merged += not enough(whole.first(self._met[point])) if self._met[point] else 1
        for end in BATCHES:
            if enough(whole.first(end)):
                break
        else:
            end = EXAMPLES
        Scored.met += max(0, end - self._met[point])
        self._met[point] = max(end, self._met[point])
        return whole.first(end)


class AddedUp:
    """Stands for a group with coefficients."""

    class _Task:
        def __init__(self, name: str) -> None:
            self.entry = self
            self.name = name

    tasks = (_Task("defended"), _Task("rider"))
    models = ("mine", "theirs")
    merge = MergeEntry("task_arithmetic", "task_arithmetic", {})


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Found, int]]:
    """What a search finds in a table of credits, and how many examples it took."""
    monkeypatch.setattr(searching, "takes_coefficients", lambda group: True)

    def run(table: Table, alone: np.ndarray, doubt: float, is_cheap: bool = True) -> tuple[Found, int]:
        monkeypatch.setattr(searching, "merges_cheaply", lambda group: is_cheap)
        Scored.merged = 0
        monkeypatch.setattr(searching, "Scoring", lambda *_: Scored(table))
        Scored.met = 0
        rules = Rules("defended", "rider", alone, (), len(table), doubt)
        group: Any = AddedUp()
        found = search(group, GRID, skill_to_keep(float(alone.mean())), rules, Path())
        return found, Scored.met

    return run


def chosen(table: Table, alone: np.ndarray) -> Any:
    """The attacker's choice with all examples; None where nothing counts."""
    points = list(table)
    means = [np.array([table[point][task].mean() for point in points]) for task in ("defended", "rider")]
    best = choice(means[0], means[1], float(alone.mean()))
    return None if best is None else points[best]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_bet_against_the_truth_wins_nothing_on_average(count: int) -> None:
    """Over all sets of examples that may come first: at most 1 where the mean over all is not positive."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        gains = generator.uniform(-0.5, 0.5, 8)
        gains -= gains.mean()  # none is beyond 1
        won = np.mean([capital(gains[list(first)]) for first in combinations(range(8), count)])
        assert won <= 1 + 1e-12
    # Control: against what is false something is won.
    assert np.mean([capital(np.array([0.5, 0.1])[list(first)]) for first in combinations(range(2), 1)]) > 1


def mixed(seed: int, shares: Sequence[float] | np.ndarray, skill: float = 0.92) -> tuple[Table, np.ndarray]:
    """Attacks that differ little, and a free-rider's model that some of them are as good as."""
    generator = np.random.default_rng(seed)
    alone = credited(0.95, generator)
    table: Table = {
        point: {"defended": credited(share, generator), "rider": credited(skill, generator)}
        for point, share in zip(POINTS, shares, strict=True)
    }
    return table, alone


def test_the_choice_is_dropped_no_more_often_than_promised(raced: Callable[..., tuple[Found, int]]) -> None:
    """Of 300 races with a doubt of 5 %, 15 may drop it; 4 standard deviations of that count are 15."""
    doubt, races = 0.05, 300
    dropped = whole = met = 0
    for seed in range(races):
        table, alone = mixed(seed, np.linspace(0.2, 0.8, len(POINTS)))
        found, examples = raced(table, alone, doubt)
        best = chosen(table, alone)
        dropped += best is not None and best not in found.cells
        met += examples
        whole += EXAMPLES * len(table)
    assert dropped <= doubt * races + 4 * np.sqrt(doubt * (1 - doubt) * races)
    assert met < 0.75 * whole, "attacks leave"


def test_a_race_on_hunches_would_drop_it(
    raced: Callable[..., tuple[Found, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: whoever leaves as soon as anything at all speaks against it may be the choice."""

    def hunch(race: Race, met: Cell) -> bool:
        return race.estimate(met)[0] < max((c.credits["defended"].mean() for c in race._rivals), default=0)

    monkeypatch.setattr(Race, "is_out", hunch)
    dropped = 0
    for seed in range(60):
        table, alone = mixed(seed, np.linspace(0.6, 0.7, len(POINTS)))
        best = chosen(table, alone)
        dropped += best is not None and best not in raced(table, alone, 0.05)[0].cells
    assert dropped >= 20


def test_the_hopeless_leave_after_one_batch(raced: Callable[..., tuple[Found, int]]) -> None:
    table, alone = mixed(0, [0.95] + [0.05] * (len(POINTS) - 1), skill=0.99)
    found, examples = raced(table, alone, 0.001)
    assert set(found.cells) == {POINTS[0]}
    assert examples == EXAMPLES + BATCHES[0] * (len(POINTS) - 1)
    assert len(found.left) + len(found.cells) == len(found.scores) == len(POINTS)
    # Control: without a race all are scored on all examples.
    found, examples = raced(table, alone, 0)
    assert not found.left
    assert examples == EXAMPLES * len(POINTS)


def test_what_is_dear_is_merged_once(raced: Callable[..., tuple[Found, int]]) -> None:
    """The control, where merging is cheap: those that go on after the first batch are merged again."""
    table, alone = mixed(0, np.linspace(0.2, 0.8, len(POINTS)))
    cheap, _ = raced(table, alone, 0.001)
    assert Scored.merged > len(POINTS)
    dear, _ = raced(table, alone, 0.001, is_cheap=False)
    assert Scored.merged == len(POINTS)
    best = chosen(table, alone)
    assert best in cheap.cells
    assert best in dear.cells


def test_who_breaks_the_bar_leaves_and_the_best_of_them_is_scored(raced: Callable[..., tuple[Found, int]]) -> None:
    """Where all leave, one is scored in full all the same."""
    table, alone = mixed(0, [0.9] * len(POINTS), skill=0.02)
    found, examples = raced(table, alone, 0.001)
    assert len(found.cells) == 1
    assert examples == EXAMPLES + BATCHES[0] * (len(POINTS) - 1)


def right(share: float) -> np.ndarray:
    """Right answers spread evenly over the examples."""
    numbers = np.arange(EXAMPLES)
    steps: np.ndarray = np.floor((numbers + 1) * share) > np.floor(numbers * share)
    return steps.astype(float)


def race(*rivals: Cell, **rules: Any) -> Race:
    return Race(Rules("defended", "rider", np.ones(EXAMPLES), rivals, 10, **rules))


def test_who_barely_keeps_the_skill_drops_nobody_that_keeps_more() -> None:
    """In many draws of a bootstrap it does not keep it; the other would be chosen then."""
    worse = cell(right(0.1), right(0.99)).first(BATCHES[1])
    barely, safely = cell(right(0.9), right(0.955)), cell(right(0.9), np.ones(EXAMPLES))
    assert not race(barely).is_out(worse)
    assert race(safely).is_out(worse)
    assert race(barely).is_out(cell(right(0.1), right(0.95)).first(BATCHES[1])), "who keeps no more is dropped"
    assert not race(cell(right(0.9), right(0.94))).is_out(worse), "one that does not count drops nobody"


def test_at_any_bar_the_choice_stays() -> None:
    worse, lax = cell(right(0.1), right(0.995)).first(BATCHES[1]), cell(right(0.9), right(0.985))
    assert race(lax, bars=(0.90,)).is_out(worse)
    assert not race(lax, bars=(0.90, 0.99)).is_out(worse)


def test_what_is_missing_is_estimated_from_the_nearest_rival() -> None:
    """The first examples are easy for all: the mean of those would flatter."""
    easy = np.concatenate([np.ones(100), np.zeros(100)])
    like, unlike = cell(easy, np.ones(EXAMPLES)), cell(np.zeros(EXAMPLES), np.zeros(EXAMPLES))
    met = cell(easy, np.ones(EXAMPLES)).first(BATCHES[1])
    assert race(like, unlike).estimate(met) == (0.5, 1.0)
    assert race().estimate(met) == (1.0, 1.0)


class Counting:
    """A task whose credits are the numbers of its examples; counts how often each was asked."""

    def __init__(self, numbers: Sequence[int], asked: list[int]) -> None:
        self.numbers, self.asked = numbers, asked

    def __len__(self) -> int:
        return len(self.numbers)

    def only(self, start: int, stop: int) -> Counting:
        return Counting(self.numbers[start:stop], self.asked)

    def credits(self, network: Any) -> np.ndarray:
        self.asked += self.numbers
        return np.array(self.numbers, float)

    def losses(self, network: Any) -> np.ndarray:
        return -self.credits(network)


@pytest.mark.parametrize("sizes", [(200, 200), (200, 40), (20, 20), (128, 32)])
def test_a_cell_is_gone_on_with(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """Batch by batch, each example is met once, tasks of different sizes among them; what is stored is not asked."""
    store, asked = CellStore(tmp_path), {"a": list[int](), "b": list[int]()}
    scorers = {name: Counting(range(size), asked[name]) for (name, size) in zip("ab", sizes, strict=True)}
    opened = []

    class Network:
        def __enter__(self) -> None:
            opened.append(1)

        def __exit__(self, *_: object) -> None:
            pass

    def met(enough: Callable[[Cell], bool]) -> Cell:
        network: Any = Network
        given: Any = scorers
        found = meet({"x": 1}, network, lambda: given, store, batches=BATCHES, enough=enough)
        assert isinstance(found, Cell)
        return found

    first = met(lambda some: True)
    assert {name: len(credits_) for name, credits_ in first.credits.items()} == {
        name: min(size, BATCHES[0]) for name, size in zip("ab", sizes, strict=True)
    }
    assert first.is_whole == (max(sizes) <= BATCHES[0])
    third = met(lambda some: some.met >= BATCHES[1])
    whole = met(never)
    assert whole.is_whole
    for name, size in zip("ab", sizes, strict=True):
        assert asked[name] == list(range(size)) == whole.credits[name].tolist()
    before = len(opened)
    assert met(lambda some: some.met >= BATCHES[1]).credits.keys() == third.credits.keys()
    again = met(lambda some: True)
    assert len(opened) == before, "all is stored"
    assert {name: values.tolist() for name, values in again.credits.items()} == {
        name: values.tolist() for name, values in first.credits.items()
    }
    assert replace(again, cpu_seconds=0.0).is_whole == first.is_whole
