"""Which attacks cannot be the attacker's choice, however the examples that they have not met turn out.

Attacks meet validation examples in batches, all in one order that a seed decides, and leave when it is settled that
they do not keep the free-rider's skill, or that another attack that does keep it gets more of the defended one. What
settles it is a bet (Shafer, "Testing by betting", JRSS A 184, 2021) against the attack: with gains g_i per example,
paired and between -1 and 1,

    capital = mean over stakes s in {0.3, 0.6, 0.9} of  prod_{i <= n} (1 + s g_i)

    g_i = share * alone_i - rider_i                against keeping the skill: the mean over all examples is positive
    g_i = defended_i(rival) - defended_i           against being better than a rival that has met every example

How sure that is. Suppose an attack is what would be chosen on all N examples. Then the mean of each g over them is not
positive. The first n are drawn from them without replacement, so the expectation of a product is the n-th elementary
symmetric mean of the factors 1 + s g_i >= 0, which by Maclaurin's inequality is at most their mean to the power of n:
at most 1. So by Markov's inequality a capital of 1 / p is reached with a probability of at most p. The attack is bet
against in as many ways as there are bars and rivals, after each of the batches; with

    p = doubt / (batches * bars * (1 + rivals that there might be))

it is dropped with a probability of at most ``doubt`` (0.001), over the order of the examples, whatever the credits and
whichever attacks the rivals turn out to be. The same holds of the attack that is best in expectation, where examples
are drawn independently. Nothing is assumed of the distribution, and no variance is estimated.

A bootstrap draws the examples anew, and the attacker selects anew. A rival that barely keeps the skill does not keep it
in every draw; attacks that keep more would then be chosen. So a rival counts only against attacks that keep no more
than it does, or when it keeps the skill in all but a few draws: its mean lies ``ROOM`` standard errors above the bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from unmergeable.evaluation.cells import Cell
from unmergeable.evaluation.selection import KEPT_SHARE, ROUNDING, Floats

BATCHES = (32, 64, 128)
"""Examples of each task after which attacks may leave."""

DOUBT = 0.001
"""The largest probability that the attack that would be chosen on all examples is not among those that stay, for one
free-rider and one model under attack; unless a plan says otherwise."""

STAKES = np.array([0.3, 0.6, 0.9])

ROOM = 2.0
"""Standard errors: a rival this far above the bar keeps the skill in 97.7 % of the draws of a bootstrap."""


@dataclass(frozen=True)
class Rules:
    """What decides who leaves.

    Attributes:
        defended, rider: names of the tasks.
        rider_alone: credits of the free-rider's own model on all validation examples of its task, [examples].
        rivals: cells of attacks that are at hand to whoever has those that race, whole ones.
        possible: how many attacks any of them might be compared with.
        doubt: the largest probability with which the choice is dropped; where it is 0 nobody leaves.
        bars: shares of the free-rider's skill; who may be the choice at one of them stays.
    """

    defended: str
    rider: str
    rider_alone: Floats
    rivals: tuple[Cell, ...]
    possible: int
    doubt: float = DOUBT
    bars: tuple[float, ...] = (KEPT_SHARE,)


@dataclass
class Race:
    """Attacks that have met every example are rivals of all others."""

    rules: Rules
    _rivals: list[Cell] = field(init=False)

    def __post_init__(self) -> None:
        self._rivals = list(self.rules.rivals)

    def add(self, cell: Cell) -> None:
        """Take in one that has met every example."""
        assert cell.is_whole
        self._rivals.append(cell)

    def is_out(self, cell: Cell) -> bool:
        """Whether an attack cannot be the choice, by the examples it has met."""
        rules = self.rules
        if rules.doubt == 0:
            return False
        enough = len(BATCHES) * len(rules.bars) * (1 + rules.possible) / rules.doubt
        return all(self._is_out_at(bar, cell, enough) for bar in rules.bars)

    def _is_out_at(self, bar: float, cell: Cell, enough: float) -> bool:
        if capital(-self._margins(bar, cell)) >= enough:
            return True
        return any(
            capital(_gains(rival, cell, self.rules.defended)) >= enough
            for rival in self._rivals
            if self._counts_against(bar, rival, cell)
        )

    def _counts_against(self, bar: float, rival: Cell, cell: Cell) -> bool:
        margins = self._margins(bar, rival)
        if margins.mean() < 0:
            return False
        if _gains(rival, cell, self.rules.rider).mean() >= 0:
            return True
        return bool(margins.mean() >= ROOM * margins.std() / np.sqrt(len(margins)))

    def _margins(self, bar: float, cell: Cell) -> Floats:
        """By how much each example of the free-rider's task is above the bar; the mean decides."""
        credited = cell.credits[self.rules.rider]
        return np.asarray(credited - bar * self.rules.rider_alone[: len(credited)] + ROUNDING)

    def estimate(self, cell: Cell) -> tuple[float, float]:
        """Mean credits on the defended task and on the free-rider's, on all examples as far as can be told.

        What an attack lacks is estimated by its difference to the rival that is most like it on those it has met: the
        luck of these examples is common to both.
        """
        tasks = (self.rules.defended, self.rules.rider)
        if cell.is_whole or not self._rivals:
            return _means(cell, tasks)
        like = min(self._rivals, key=lambda rival: sum(np.abs(_gains(rival, cell, task)).mean() for task in tasks))
        of_rival = _means(like, tasks)
        defended, rider = (
            float(np.clip(mean - _gains(like, cell, task).mean(), 0, 1))
            for mean, task in zip(of_rival, tasks, strict=True)
        )
        return defended, rider


def capital(gains: Floats) -> float:
    """What betting against an attack has made of 1; see the head of this module."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.log1p(STAKES[:, None] * gains).sum(axis=1)).mean())


def mean_credits(cell: Cell, defended: str, rider: str) -> tuple[float, float]:
    """On the defended task and on the free-rider's, of the examples met."""
    return _means(cell, (defended, rider))


def _means(cell: Cell, tasks: Sequence[str]) -> tuple[float, float]:
    defended, rider = (float(cell.credits[task].mean()) for task in tasks)
    return defended, rider


def _gains(rival: Cell, cell: Cell, task: str) -> Floats:
    """By how much the rival is better, on each example that both have met."""
    credited = cell.credits[task]
    return np.asarray(rival.credits[task][: len(credited)] - credited)
