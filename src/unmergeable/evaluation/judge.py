"""From scored attacks to verdicts: D* per protection, tier, free-rider and seed, what it is made of, and the controls.

The headline of a protection is its worst case: the lowest D* over free-riders and seeds. Fronts, matrices and costs
beside it say where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unmergeable.attacks import FewShot
from unmergeable.evaluation.cells import Cell, Credits
from unmergeable.evaluation.models import IDENTITY, SCALE, Variant
from unmergeable.evaluation.plan import MethodEntry, Plan, Tier
from unmergeable.evaluation.search import Point
from unmergeable.evaluation.worst_case import KEPT_SHARE, Menu, WorstCase, pareto_front, worst_case

IDENTITY_BOUND, SCALE_BOUND = 0.05, 0.1
"""The largest |D*| the controls may have: neither protects anything."""

LUCK_OF_TRAINING = 0.02
"""Share of right answers by which two trainings differ whose starts differ by a rounding."""

PLANTED_BOUND = 1.02
"""Times the unprotected expert's distance to the base: what a recovery that finds the key leaves at most."""


@dataclass(frozen=True)
class Attack:
    """One set of merged weights, scored. ``variant`` is None where the victim was left alone.

    ``test`` is None for attacks that no selection would pick. ``training`` is what came after merging.
    """

    variant: Variant | None
    rider: str
    merge: MethodEntry | None
    point: Point | None
    validation: Cell
    test: Cell | None
    training: FewShot | None = None

    @property
    def tier(self) -> Tier:
        """The lowest one whose attacker can do it."""
        merging: Tier = "T0" if self.merge is None else self.merge.tier
        return max(
            "T0" if self.variant is None else self.variant.tier, merging, "T0" if self.training is None else "T2"
        )

    def describe(self) -> dict[str, Any]:
        """What was done, for people who want to do it again."""
        return {
            "recovery": None if self.variant is None else self.variant.recovery,
            "merge": None if self.merge is None else self.merge.name,
            "coefficients": None if self.point is None else list(self.point),
            "uses_victim": self.variant is not None,
            "samples": None if self.training is None else self.training.samples,
            "learning_rate": None if self.training is None else float(self.training.learning_rates),
            "cpu_seconds": round(self.cpu_seconds, 3),
        }

    @property
    def cpu_seconds(self) -> float:
        """Of the recovery, of merging, training and scoring once; the search for the coefficients is not in it."""
        return self.validation.cpu_seconds + (0.0 if self.variant is None else self.variant.cpu_seconds)


@dataclass(frozen=True)
class Contest:
    """All attacks on behalf of one free-rider, and its own model's credits on validation examples of its task."""

    rider: str
    defended_task: str
    rider_task: str
    rider_alone: Credits
    attacks: tuple[Attack, ...]

    def attacks_on(self, protection: str, seed: int, tier: Tier, samples: int | None = None) -> list[Attack]:
        """What an attacker of this tier with so many labelled examples may do to a protected model."""
        return [
            attack
            for attack in self._within(tier, samples)
            if attack.variant is not None and (attack.variant.protection, attack.variant.seed) == (protection, seed)
        ]

    def without_victim(self, tier: Tier, samples: int | None = None) -> list[Attack]:
        """What such an attacker can have without it."""
        return [attack for attack in self._within(tier, samples) if attack.variant is None]

    def _within(self, tier: Tier, samples: int | None) -> list[Attack]:
        """Tiers contain the lower ones."""
        return [
            attack
            for attack in self.attacks
            if attack.tier <= tier and (attack.training is None or attack.training.samples == samples)
        ]

    def menu(self, attacks: Sequence[Attack]) -> Menu:
        """Their credits; empty when there are none."""
        reference = self.without_victim("T0")[0]
        assert reference.test is not None
        examples = len(reference.test.credits[self.defended_task])
        untested = np.full(examples, np.nan)

        def rows(values: Iterable[Credits], length: int) -> Credits:
            stacked = list(values)
            return np.array(stacked) if stacked else np.empty((0, length))

        return Menu(
            rows(
                (attack.validation.credits[self.defended_task] for attack in attacks),
                len(reference.validation.credits[self.defended_task]),
            ),
            rows((attack.validation.credits[self.rider_task] for attack in attacks), len(self.rider_alone)),
            rows(
                (untested if attack.test is None else attack.test.credits[self.defended_task] for attack in attacks),
                examples,
            ),
        )


def judge(
    plan: Plan,
    contests: Sequence[Contest],
    variants: Sequence[Variant],
    *,
    alone_scores: Mapping[str, Mapping[str, float]],
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The result of an audit: protections, controls, cells, and whether all controls hold."""
    released = [variant for variant in variants if variant.recovery is None]
    protections = {}
    for name in dict.fromkeys(variant.protection for variant in released):
        its = [variant for variant in released if variant.protection == name]
        protections[name] = _protection(plan, contests, its, released[0], alone_scores)
    controls = _controls(protections, variants)
    return {
        "task": plan.victim.task,
        "kept_share": KEPT_SHARE,
        "alone": alone_scores,
        "protections": protections,
        "models": [_model(variant) for variant in variants],
        "connectivity": list(lines),
        "controls": controls,
        "passed": all(control["passed"] for control in controls),
        "cells": [_cell(attack, contest) for contest in contests for attack in contest.attacks],
    }


def _protection(
    plan: Plan,
    contests: Sequence[Contest],
    released: Sequence[Variant],
    unprotected: Variant,
    alone: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """One protection, ``released`` with each key."""
    task, name, seeds = plan.victim.task, released[0].protection, [variant.seed for variant in released]
    expert, base = alone[unprotected.label][task], alone["base"][task]
    protected = min(alone[variant.label][task] for variant in released)
    per_tier: dict[str, Any] = {}
    for tier in plan.tiers:
        trials = [
            _trial(contest, name, seed, tier, samples)
            for contest in contests
            for seed in seeds
            for samples in _samples(plan, tier)
        ]
        per_tier[tier] = {"worst": _worst(trials), "trials": trials}
    matrix = _matrix(plan, contests, name, seeds)
    return {
        "is_control": name in (IDENTITY, SCALE),
        "utility": {"expert": expert, "protected": protected, "loss": expert - protected},
        "tiers": per_tier,
        "matrix": matrix,
        "drop_ratio": _drop_ratios(matrix, expert, base),
        "fronts": [_fronts(plan, contest, name, seeds[0]) for contest in contests],
    }


def _samples(plan: Plan, tier: Tier) -> Sequence[int | None]:
    """How many labelled examples the attackers of a tier have."""
    return plan.few_shot.samples if tier in ("T2", "T3") else (None,)


def _trial(contest: Contest, name: str, seed: int, tier: Tier, samples: int | None) -> dict[str, Any]:
    """One free-rider, one key, one number of labelled examples."""
    unprotected = contest.attacks_on(IDENTITY, 0, tier, samples)
    protected = contest.attacks_on(name, seed, tier, samples)
    without = contest.without_victim(tier, samples)
    found = worst_case(contest.menu(unprotected), contest.menu(protected), contest.menu(without), contest.rider_alone)
    menus = {"unprotected": [*unprotected, *without], "protected": [*protected, *without], "without_victim": without}
    chosen = (found.best_unprotected, found.best_protected, found.best_reference)
    return {
        "rider": contest.rider,
        "seed": seed,
        "samples": samples,
        **_figures(found),
        "attacks_tried": len(protected),
        "search_cpu_seconds": round(sum(attack.cpu_seconds for attack in protected), 1),
        "best": {label: menus[label][number].describe() for label, number in zip(menus, chosen, strict=True)},
    }


def _figures(found: WorstCase) -> dict[str, Any]:
    return {
        "d_star": _number(found.d_star),
        "interval": [_number(found.low), _number(found.high)],
        "unprotected": found.unprotected,
        "protected": found.protected,
        "without_victim": found.reference,
        "is_denominator_small": found.is_small,
    }


def _worst(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial with the lowest D*, among those with enough to defend if there are any.

    None when the victim adds nothing in any of them.
    """
    known = [trial for trial in trials if trial["d_star"] is not None]
    told = [trial for trial in known if not trial["is_denominator_small"]]
    return min(told or known, key=lambda trial: trial["d_star"], default=None)


def _best(contest: Contest, attacks: Sequence[Attack]) -> Attack | None:
    """The attacker's choice among some attacks; None when none of them keeps the free-rider's skill."""
    kept = KEPT_SHARE * float(contest.rider_alone.mean()) - 1e-12
    usable = [a for a in attacks if a.validation.credits[contest.rider_task].mean() >= kept]
    return max(usable, key=lambda a: a.validation.credits[contest.defended_task].mean(), default=None)


def _matrix(plan: Plan, contests: Sequence[Contest], name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The best test score of each recovery with each merge, over free-riders and seeds: where the worst case lies."""
    rows = []
    for recovery in (None, *(entry.name for entry in plan.recoveries if plan.reaches(entry.tier))):
        for merge in (merge for merge in plan.merges if plan.reaches(merge.tier)):
            scores, attempts = [], 0
            for contest in contests:
                for seed in seeds:
                    attacks = [
                        attack
                        for attack in contest.attacks_on(name, seed, plan.tiers[-1])
                        if attack.variant is not None and attack.variant.recovery == recovery and attack.merge == merge
                    ]
                    attempts += len(attacks)
                    best = _best(contest, attacks)
                    if best is not None and best.test is not None:
                        scores.append(float(best.test.credits[contest.defended_task].mean()))
            rows.append(
                {"recovery": recovery, "merge": merge.name, "score": max(scores, default=None), "attacks": attempts}
            )
    return rows


def _drop_ratios(matrix: Sequence[Mapping[str, Any]], expert: float, base: float) -> dict[str, float | None]:
    """The published measure, per merge without recovery: (expert - merge) / (expert - base), the lowest found."""
    return {
        cell["merge"]: None if cell["score"] is None or expert <= base else (expert - cell["score"]) / (expert - base)
        for cell in matrix
        if cell["recovery"] is None
    }


def _fronts(plan: Plan, contest: Contest, name: str, seed: int) -> dict[str, Any]:
    """Test scores of the strongest attacker's attacks that no other beats on both tasks, on validation examples."""
    tier = plan.tiers[-1]
    samples = _samples(plan, tier)[-1]
    groups = {
        "unprotected": contest.attacks_on(IDENTITY, 0, tier, samples),
        "protected": contest.attacks_on(name, seed, tier, samples),
        "without_victim": contest.without_victim(tier, samples),
    }
    about = {"rider": contest.rider, "seed": seed, "tier": tier, "samples": samples}
    return {**about, **{label: _front(contest, group) for label, group in groups.items()}}


def _front(contest: Contest, attacks: Sequence[Attack]) -> list[list[float]]:
    tested = [attack for attack in attacks if attack.test is not None]
    defended, rider = (
        [float(attack.validation.credits[task].mean()) for attack in tested]
        for task in (contest.defended_task, contest.rider_task)
    )
    chosen = [tested[number].test for number in pareto_front(defended, rider)]
    return [
        [float(cell.credits[task].mean()) for task in (contest.defended_task, contest.rider_task)]
        for cell in chosen
        if cell is not None
    ]


def _controls(protections: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """What must hold in every audit, or it found nothing out."""
    controls = [
        _bounded(protections, IDENTITY, IDENTITY_BOUND, "the expert itself is no protection"),
        _bounded(protections, SCALE, SCALE_BOUND, "a shrunk task vector is no protection"),
    ]
    for variant in variants:
        planted = _planted_key(variant, variants)
        if planted is not None:
            controls.append(planted)
    return controls


def _planted_key(variant: Variant, variants: Sequence[Variant]) -> dict[str, Any] | None:
    """How near a fit of changes of basis came; only the one over the largest group must find every planted key."""
    origin = None if variant.recovery is None else _distance_of_expert(variants, variant.recovery)
    after = variant.facts.get("distance_after")
    if not variant.has_key or variant.recovery is None or not origin or after is None:
        return None
    bound = PLANTED_BOUND if variant.facts.get("method") == "nearest_orbit" else None
    return {
        "name": f"{variant.recovery} on {variant.label}",
        "what": "distance to the base after the recovery, in units of the unprotected expert's",
        "value": after / origin,
        "bound": bound,
        "passed": bound is None or after / origin <= bound,
    }


def _distance_of_expert(variants: Sequence[Variant], recovery: str) -> float | None:
    """The unprotected expert's distance, which the same recovery reports when it is run on the expert."""
    for variant in variants:
        if variant.protection == IDENTITY and variant.recovery == recovery:
            distance: float | None = variant.facts.get("distance_before")
            return distance
    return None


def _bounded(protections: Mapping[str, Any], name: str, bound: float, what: str) -> dict[str, Any]:
    values = [
        _distance_from_nothing(tier, trial)
        for tier, found in protections[name]["tiers"].items()
        for trial in found["trials"]
    ]
    value = max((value for value in values if value is not None), default=None)
    return {
        "name": name,
        "what": f"largest |D*|: {what}",
        "value": value,
        "bound": bound,
        "passed": value is not None and value <= bound,
    }


def _distance_from_nothing(tier: Tier, trial: Mapping[str, Any]) -> float | None:
    """|D*|; of attackers who train, less what two trainings end apart by luck alone."""
    value: float | None = trial["d_star"]
    if value is None or tier in ("T0", "T1"):
        return None if value is None else abs(value)
    luck: float = LUCK_OF_TRAINING / (trial["unprotected"] - trial["without_victim"])
    return max(0.0, abs(value) - luck)


def _model(variant: Variant) -> dict[str, Any]:
    kept = ("distance_before", "distance_after", "confidence", "measured_block_error", "condition_bound", "findings")
    return {
        "protection": variant.protection,
        "seed": variant.seed,
        "recovery": variant.recovery,
        "cpu_seconds": variant.cpu_seconds,
        "refusal": variant.refusal,
        **{name: variant.facts[name] for name in kept if name in variant.facts},
    }


def _cell(attack: Attack, contest: Contest) -> dict[str, Any]:
    variant = attack.variant
    return {
        "protection": None if variant is None else variant.protection,
        "seed": None if variant is None else variant.seed,
        "rider": attack.rider,
        "tier": attack.tier,
        **attack.describe(),
        "scores": {
            part: None
            if cell is None
            else {task: float(cell.credits[task].mean()) for task in (contest.defended_task, contest.rider_task)}
            for part, cell in (("validation", attack.validation), ("test", attack.test))
        },
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
