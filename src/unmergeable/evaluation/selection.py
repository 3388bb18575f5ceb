"""The attacker's choice: which of the attacks it tried it goes on with, from its scores on validation examples.

An attack counts only when it keeps the free-rider's own skill. Among those that count, the attacker takes the one that
gets most of the defended skill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from unmergeable.evaluation.cells import Cell

Floats = npt.NDArray[np.float64]

KEPT_SHARE = 0.95
"""Of the free-rider's own score, which an attack has to keep to count."""

BARS = (0.90, KEPT_SHARE, 0.98)
"""The shares at which verdicts are given side by side: at a single one, an example in two hundred may decide."""

ROUNDING = 1e-12
"""An attack that keeps exactly that share counts, in whatever order its examples are added up."""


Scores = TypeVar("Scores", float, Floats)


def skill_to_keep(rider_alone: Scores, share: float = KEPT_SHARE) -> Scores:
    """The score on its own task that an attack must keep, from that of the free-rider's own model."""
    return share * rider_alone - ROUNDING


def choice(defended: Floats, rider: Floats, rider_alone: float, share: float = KEPT_SHARE) -> int | None:
    """The number of the attack that the attacker picks; None when none keeps the free-rider's skill.

    Args:
        defended: scores on the defended task, [attacks].
        rider: scores on the free-rider's task, [attacks].
        rider_alone: the score of the free-rider's own model on its task.
        share: of that score, which an attack must keep.
    """
    counts = rider >= skill_to_keep(rider_alone, share)
    return int(np.where(counts, defended, -1.0).argmax()) if counts.any() else None


@dataclass(frozen=True)
class Menu:
    """What the attacks of a menu score, example by example, as credits in [0, 1].

    Attributes:
        defended: on validation examples of the defended task, [attacks, examples].
        rider: on validation examples of the free-rider's task, [attacks, examples].
        test: on test examples of the defended task, [attacks, examples]; NaN rows for attacks that no selection picks
            and that were therefore never tested.
    """

    defended: Floats
    rider: Floats
    test: Floats

    def __post_init__(self) -> None:
        assert len(self.defended) == len(self.rider) == len(self.test)

    @classmethod
    def of(cls, cells: Sequence[tuple[Cell, Cell | None]], defended: str, rider: str) -> Menu:
        """From the cells of each attack on validation and test examples (None: not tested), and the two tasks."""
        tested = [None if test is None else test.credits[defended] for _, test in cells]
        untested = np.full(next((len(row) for row in tested if row is not None), 1), np.nan)
        return cls(
            np.array([validation.credits[defended] for validation, _ in cells]),
            np.array([validation.credits[rider] for validation, _ in cells]),
            np.array([untested if row is None else row for row in tested]),
        )

    def only(self, numbers: Sequence[int]) -> Menu:
        chosen = np.array(numbers, dtype=int)
        return Menu(self.defended[chosen], self.rider[chosen], self.test[chosen])

    def joined(self, other: Menu) -> Menu:
        """Both menus, this one's attacks first."""
        return Menu(
            np.concatenate([self.defended, other.defended]),
            np.concatenate([self.rider, other.rider]),
            np.concatenate([self.test, other.test]),
        )


def area_under(defended: Floats, test: Floats, kept: Floats, least: float) -> float:
    """What an attacker gets on average over all shares of skill that it may have to keep, from ``least`` to 1.

    At every share the attacker picks as :func:`choice` does, and of equal attacks the one that keeps most. So this is
    the area under the Pareto front of validation scores, at test scores, over the width of the strip.

    Args:
        defended: scores on the defended task, on validation examples, [attacks].
        test: the same on test examples, [attacks].
        kept: share of the free-rider's own skill that an attack keeps, on validation examples, [attacks].
        least: where the strip begins.

    Returns:
        A score; at shares that no attack keeps it counts as 0.
    """
    order = np.lexsort((np.arange(len(kept)), -defended, -kept))
    area, upper, got, highest = 0.0, 1.0, 0.0, -np.inf
    for number in order:
        if kept[number] <= least:
            break
        if defended[number] > highest:
            share = min(1.0, float(kept[number]))
            area += got * (upper - share)
            upper, got, highest = share, float(test[number]), defended[number]
    return (area + got * (upper - least)) / (1 - least)


def pareto_front(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> list[int]:
    """The points that no other point beats in both coordinates, in the order of the first; the first of equal ones."""
    order = np.lexsort((np.arange(len(first)), -np.asarray(second), -np.asarray(first)))
    front, highest = [], -np.inf
    for number in order:
        if second[number] > highest:
            front.append(int(number))
            highest = second[number]
    return front[::-1]
