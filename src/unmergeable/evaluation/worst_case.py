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
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from unmergeable.evaluation.selection import Floats, Menu, choice, pareto_front

RESAMPLES = 1000
CONFIDENCE = 0.95

SMALL_DENOMINATOR = 0.05
"""Below five points between the best merge and no victim at all there was little to defend, and D* means little."""


@dataclass(frozen=True)
class WorstCase:
    """D* and what it is made of: scores in [0, 1], on test examples, of the attack selected on validation examples.

    ``best_…`` is the number of the selected attack in its menu. ``is_small``: there was little to defend.
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
    """D* of a protection, with its interval.

    Args:
        unprotected: attacks on the expert as it was.
        protected: the same menu of attacks on the protected expert.
        without_victim: what can be had without it: the free-rider's own model, or parts of it.
        rider_alone: credits of the free-rider's model on the validation examples of its task, [examples].
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    menus = (unprotected.joined(without_victim), protected.joined(without_victim), without_victim)
    (best, best_number), (worst, worst_number), (reference, reference_number) = (
        _selected(menu, rider_alone, _whole(menu)) for menu in menus
    )
    drawn = [
        _ratio(*(_selected(menu, rider_alone, weights)[0] for menu in menus))
        for weights in _draws(menus[0], seed, resamples)
    ]
    low, high = _interval([ratio for ratio in drawn if not math.isnan(ratio)])
    return WorstCase(
        d_star=_ratio(best, worst, reference),
        low=low,
        high=high,
        unprotected=best,
        protected=worst,
        reference=reference,
        best_unprotected=best_number,
        best_protected=worst_number,
        best_reference=reference_number,
    )


def selected(menu: Menu, rider_alone: Floats) -> tuple[float, int]:
    """The test score of the attack that an attacker picks from a menu, and its number."""
    return _selected(menu, rider_alone, _whole(menu))


def contenders(
    menu: Menu, without_victim: Menu, rider_alone: Floats, *, seed: int = 0, resamples: int = RESAMPLES
) -> list[int]:
    """The attacks of ``menu`` that need a test: selected as it stands, or in some resample, or on the Pareto front.

    With the same seed and number of resamples these are all that :func:`worst_case` ever looks at.
    """
    joined = menu.joined(without_victim)
    count = len(menu.defended)
    picked = {_select(joined, rider_alone, _whole(joined))}
    for weights in _draws(joined, seed, resamples):
        picked.add(_select(joined, rider_alone, weights))
    front = pareto_front(menu.defended.mean(axis=1), menu.rider.mean(axis=1))
    return sorted({number for number in picked if number < count} | set(front))


@dataclass(frozen=True)
class _Weights:
    """How often each example was drawn, as fractions that add up to 1."""

    defended: Floats
    rider: Floats
    test: Floats


def _whole(menu: Menu) -> _Weights:
    return _Weights(*(np.full(rows.shape[1], 1 / rows.shape[1]) for rows in (menu.defended, menu.rider, menu.test)))


def _draws(menu: Menu, seed: int, resamples: int) -> tuple[_Weights, ...]:
    return _drawn((menu.defended.shape[1], menu.rider.shape[1], menu.test.shape[1]), seed, resamples)


@lru_cache(maxsize=4)
def _drawn(sizes: tuple[int, ...], seed: int, resamples: int) -> tuple[_Weights, ...]:
    """Examples drawn with replacement. Each set of examples has its own generator: none depends on another's size."""
    shares = []
    for number, size in enumerate(sizes):
        generator = np.random.default_rng([seed, number])
        shares.append(generator.multinomial(size, np.full(size, 1 / size), resamples) / size)
    return tuple(_Weights(*rows) for rows in zip(*shares, strict=True))


def _select(menu: Menu, rider_alone: Floats, weights: _Weights) -> int:
    """The attacker's choice; the first attack where none counts."""
    chosen = choice(menu.defended @ weights.defended, menu.rider @ weights.rider, float(rider_alone @ weights.rider))
    return chosen or 0


def _selected(menu: Menu, rider_alone: Floats, weights: _Weights) -> tuple[float, int]:
    number = _select(menu, rider_alone, weights)
    return float(menu.test[number] @ weights.test), number


def _interval(values: Sequence[float]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail]) if values else (math.nan, math.nan)
    return float(low), float(high)


def _ratio(unprotected: float, protected: float, reference: float) -> float:
    """NaN where the victim adds nothing even unprotected: there is no share of nothing."""
    difference = unprotected - reference
    return (unprotected - protected) / difference if difference > 0 else math.nan
