"""What a protection is worth against the best attack in a menu: D*, its interval, and the Pareto front.

An attack turns the defended expert into a model that is good at the free-rider's own task and, the attacker hopes, at
the defended one. T_def and T_fr are its scores on the two. Attacks count only when they keep the free-rider's skill,
``T_fr >= 0.95 T_fr(free-rider alone)``; among these the attacker picks the best T_def on validation examples of its
own, and is judged on test examples:

    D* = (max over attacks on the unprotected expert - max over attacks on the protected one)
         / (max over attacks on the unprotected expert - T_ref)

T_ref is the best that can be had without the victim. D* = 0: the protection is worth nothing; D* = 1: the victim adds
nothing. Ignoring the victim is always an option, so attacks without the victim are in every menu and D* is at most 1 up
to sampling noise. It is a worst case over the menu, never a mean.

The interval is a bootstrap over examples (Efron 1979): validation and test examples are drawn anew, paired across all
attacks; the attacker selects anew each time. So it covers the luck of the selection as well as that of the test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from unmergeable.evaluation.selection import (
    BARS,
    KEPT_SHARE,
    Floats,
    Menu,
    area_under,
    choice,
    pareto_front,
    skill_to_keep,
)

RESAMPLES = 1000
CONFIDENCE = 0.95

SMALL_DENOMINATOR = 0.05
"""Below five points between the best merge and no victim at all there was little to defend, and D* means little."""

STRIP = 0.8
"""Share of the free-rider's skill from which on the area between Pareto fronts is taken. An attacker who gives up more
of its own skill had better use the release alone."""

DIGITS = 12
"""Scores that agree so far are equal: how a sum of credits is rounded depends on how many are added up at a time."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WorstCase:
    """D* and what it is made of: scores in [0, 1], on test examples, of the attack selected on validation examples.

    ``best_…`` is the number of the selected attack in its menu. ``is_small``: there was little to defend.
    ``kept_share``: of the free-rider's skill, which attacks had to keep. ``denominator_error``: standard error of the
    denominator, from the same bootstrap. ``test_error``: that of D* by the luck of the test examples alone, with the
    attacks that were selected.
    """

    d_star: float
    low: float
    high: float
    unprotected: float
    protected: float
    reference: float
    best_unprotected: int
    best_protected: int
    best_reference: int
    kept_share: float = KEPT_SHARE
    denominator_error: float = math.nan
    test_error: float = math.nan

    @property
    def denominator(self) -> float:
        """What the victim adds when it is not protected."""
        return self.unprotected - self.reference

    @property
    def is_small(self) -> bool:
        return self.denominator < SMALL_DENOMINATOR


def worst_case(
    unprotected: Menu,
    protected: Menu,
    without_victim: Menu,
    rider_alone: Floats,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> WorstCase:
    """D* of a protection at the usual share of kept skill; arguments as for :func:`worst_cases`."""
    (found,) = worst_cases(
        unprotected, protected, without_victim, rider_alone, (KEPT_SHARE,), seed=seed, resamples=resamples
    )
    return found


def worst_cases(
    unprotected: Menu,
    protected: Menu,
    without_victim: Menu,
    rider_alone: Floats,
    bars: Sequence[float] = BARS,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[WorstCase, ...]:
    """D* of a protection, with its interval, at each share of skill that an attack may have to keep.

    Args:
        unprotected: attacks on the expert as it was.
        protected: the same menu of attacks on the protected expert.
        without_victim: what can be had without it: the free-rider's own model, or parts of it.
        rider_alone: credits of the free-rider's model on the validation examples of its task, [examples].
        bars: the shares.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    menus = [unprotected.joined(without_victim), protected.joined(without_victim), without_victim]
    draws = _draws(menus[0], seed, resamples)
    scored = [_Scores.of(menu, rider_alone, draws) for menu in menus]
    return tuple(_at_bar(scored, bar) for bar in bars)


def selected(menu: Menu, rider_alone: Floats) -> tuple[float, int]:
    """The test score of the attack that an attacker picks from a menu, and its number."""
    number = choice(menu.defended.mean(axis=1), menu.rider.mean(axis=1), float(rider_alone.mean())) or 0
    return float(menu.test[number].mean()), number


@dataclass(frozen=True)
class Difference:
    """How much more the best attack of one menu gets than that of another, on test examples, and its 95 % interval."""

    value: float
    low: float
    high: float
    first: float
    second: float


def difference(
    first: Menu,
    second: Menu,
    rider_alone: Floats,
    bar: float = KEPT_SHARE,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """The best of ``first`` less the best of ``second``, with the bootstrap of :func:`worst_cases`.

    Args:
        first, second: attacks; what can be had without the victim is to be among both.
        rider_alone, seed, resamples: as for :func:`worst_cases`.
        bar: the share of the free-rider's skill that an attack must keep.
    """
    draws = _draws(first, seed, resamples)
    scored = [_Scores.of(menu, rider_alone, draws) for menu in (first, second)]
    ours, theirs = (scores.tests(scores.chosen(bar)) for scores in scored)
    low, high = _interval((ours - theirs)[1:].tolist())
    return Difference(float(ours[0] - theirs[0]), low, high, float(ours[0]), float(theirs[0]))


def area_between(unprotected: Menu, protected: Menu, without_victim: Menu, rider_alone: Floats) -> float:
    """D* with, in place of the score at one share of kept skill, the mean of all from ``STRIP`` to 1.

    The area between the Pareto fronts of the attacks on the unprotected expert and on the protected one, over that
    between the first and what can be had without the victim. NaN where there is nothing between those. Arguments as for
    :func:`worst_cases`.
    """
    alone = float(rider_alone.mean())
    areas = []
    for menu in (unprotected.joined(without_victim), protected.joined(without_victim), without_victim):
        defended, rider = (rows.mean(axis=1) for rows in (menu.defended, menu.rider))
        kept = rider / alone if alone > 0 else np.ones(len(rider))
        areas.append(area_under(defended, menu.test.mean(axis=1), kept, STRIP))
    return _ratio(*areas)


def judged(
    unprotected: Menu,
    protected: Menu,
    without_victim: Menu,
    rider_alone: Floats,
    bars: Sequence[float] = BARS,
    *,
    is_merging: bool = True,
) -> tuple[tuple[WorstCase, ...], float]:
    """What :func:`worst_cases` and :func:`area_between` say of a trial.

    NaN where an attacker who does not merge did not attack one of the two: whoever did not attack was not stopped.
    """
    found = worst_cases(unprotected, protected, without_victim, rider_alone, bars)
    area = area_between(unprotected, protected, without_victim, rider_alone)
    if is_merging or (len(unprotected.defended) and len(protected.defended)):
        return found, area
    return tuple(replace(one, d_star=math.nan, low=math.nan, high=math.nan) for one in found), math.nan


def contenders(
    menu: Menu,
    without_victim: Menu,
    rider_alone: Floats,
    bars: Sequence[float] = BARS,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[int]:
    """The attacks of ``menu`` that need a test: selected as it stands, or in some resample, or on the Pareto front.

    With the same seed, bars and number of resamples these are all that :func:`worst_cases` and :func:`area_between`
    ever look at.
    """
    scores = _Scores.of(menu.joined(without_victim), rider_alone, _draws(menu, seed, resamples))
    picked = {int(number) for bar in bars for number in scores.chosen(bar)}
    front = pareto_front(menu.defended.mean(axis=1), menu.rider.mean(axis=1))
    return sorted({number for number in picked if number < len(menu.defended)} | set(front))


@dataclass(frozen=True)
class _Draws:
    """How often each example was drawn, [draws, examples]; the first draw has each example once."""

    defended: Counts
    rider: Counts
    test: Counts


def _draws(menu: Menu, seed: int, resamples: int) -> _Draws:
    return _drawn((menu.defended.shape[1], menu.rider.shape[1], menu.test.shape[1]), seed, resamples)


@lru_cache(maxsize=4)
def _drawn(sizes: tuple[int, ...], seed: int, resamples: int) -> _Draws:
    """Examples drawn with replacement. Each set of examples has its own generator: none depends on another's size."""
    counts = []
    for number, size in enumerate(sizes):
        generator = np.random.default_rng([seed, number])
        drawn = generator.multinomial(size, np.full(size, 1 / size), resamples)
        counts.append(np.concatenate([np.ones((1, size), drawn.dtype), drawn]))
    return _Draws(*counts)


def _means(credits_of: Floats, counts: Counts) -> Floats:
    """Scores on the examples of every draw: of credits [attacks, examples] those [attacks, draws].

    Credits of 0 and 1 are counted without rounding; others are rounded to where the order of adding does not show.
    """
    means: Floats = np.round(credits_of @ counts.T.astype(float) / counts.shape[1], DIGITS)
    return means


@dataclass(frozen=True)
class _Scores:
    """What a menu scores on validation examples in every draw, [attacks, draws]; tests only of what is picked."""

    defended: Floats
    rider: Floats
    alone: Floats
    menu: Menu
    draws: _Draws

    @classmethod
    def of(cls, menu: Menu, rider_alone: Floats, draws: _Draws) -> _Scores:
        alone = _means(rider_alone[None], draws.rider)[0]
        return cls(_means(menu.defended, draws.defended), _means(menu.rider, draws.rider), alone, menu, draws)

    def chosen(self, bar: float) -> Counts:
        """The attacker's choice in every draw, [draws]; the first attack where none counts."""
        counts = self.rider >= skill_to_keep(self.alone, bar)
        numbers: Counts = np.where(counts, self.defended, -1.0).argmax(axis=0)
        return numbers

    def tests(self, chosen: Counts) -> Floats:
        """The test scores of the choices, [draws]."""
        numbers, places = np.unique(chosen, return_inverse=True)
        scores: Floats = _means(self.menu.test[numbers], self.draws.test)[places, np.arange(len(chosen))]
        return scores


def _at_bar(scored: Sequence[_Scores], bar: float) -> WorstCase:
    chosen = [scores.chosen(bar) for scores in scored]
    tests = [scores.tests(numbers) for scores, numbers in zip(scored, chosen, strict=True)]
    ratios = [_ratio(*values) for values in zip(*tests, strict=True)]
    low, high = _interval([ratio for ratio in ratios[1:] if not math.isnan(ratio)])
    unprotected, protected, reference = (float(values[0]) for values in tests)
    best = [int(numbers[0]) for numbers in chosen]
    differences = (tests[0] - tests[2])[1:]
    kept = [scored[side].tests(np.full_like(chosen[side], best[side])) for side in (0, 1)]
    is_something = unprotected > reference
    return WorstCase(
        d_star=ratios[0],
        low=low,
        high=high,
        unprotected=unprotected,
        protected=protected,
        reference=reference,
        best_unprotected=best[0],
        best_protected=best[1],
        best_reference=best[2],
        kept_share=bar,
        denominator_error=_deviation(differences),
        test_error=_deviation((kept[0] - kept[1])[1:]) / (unprotected - reference) if is_something else math.nan,
    )


def _deviation(values: Floats) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _interval(values: Sequence[float]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail]) if values else (math.nan, math.nan)
    return float(low), float(high)


def _ratio(unprotected: float, protected: float, reference: float) -> float:
    """NaN where the victim adds nothing even unprotected: there is no share of nothing."""
    difference = unprotected - reference
    return float((unprotected - protected) / difference) if difference > 0 else math.nan
