"""From scored attacks to verdicts: D* per protection, threat model, free-rider and key.

The headline of a protection is its worst case: the lowest D* over free-riders and keys. Fronts, matrices and costs
beside it say where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unmergeable.attacks import FewShot
from unmergeable.claims import DStar
from unmergeable.evaluation.cells import Cell, Credits
from unmergeable.evaluation.flags import FEWEST_EXAMPLES, STANDARD_ERRORS, Flag, is_on_edge, is_recognised
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.names import BASE, CONTROLS, IDENTITY
from unmergeable.evaluation.packing import pack
from unmergeable.evaluation.plans.audit_plan import AuditPlan
from unmergeable.evaluation.plans.entries import ExpertEntry, MergeEntry
from unmergeable.evaluation.results import (
    AtBar,
    AttackRecord,
    CellRecord,
    Excess,
    Front,
    Fronts,
    MatrixCell,
    ProtectionResult,
    Trial,
    Utility,
    Verdicts,
)
from unmergeable.evaluation.scoring import Coefficients, Group
from unmergeable.evaluation.selection import KEPT_SHARE, Menu, choice, pareto_front
from unmergeable.evaluation.threat_models import ThreatModel, least
from unmergeable.evaluation.worst_case import WorstCase, difference, judged, selected


@dataclass(frozen=True)
class Job:
    """Models to merge by one method, and whose they are.

    ``variant`` is None where the victim is left alone, ``merge`` where a model is trained as it is.
    """

    variant: Variant | None
    rider: ExpertEntry
    merge: MergeEntry | None
    group: Group

    @property
    def owner(self) -> tuple[str, int] | None:
        """The protection and the key of what is merged; None without the victim."""
        return None if self.variant is None else (self.variant.protection, self.variant.seed)

    @property
    def threat_model(self) -> ThreatModel:
        """That of the weakest attacker who can do it."""
        if self.merge is None:
            return ThreatModel.RETRAIN
        return least(step.threat_model for step in (self.variant, self.merge) if step is not None)


@dataclass(frozen=True)
class ScoredAttack:
    """One set of merged weights, scored.

    ``test`` is None for attacks that no selection would pick. ``training`` is what came after merging. Where
    ``validation`` is not whole, the attack left the race.
    """

    job: Job
    point: Coefficients | None
    validation: Cell
    test: Cell | None
    training: FewShot | None = None
    own_examples: int = 0

    @property
    def threat_model(self) -> ThreatModel:
        """That of the weakest attacker who can do it."""
        is_trained = self.training is not None and self.job.merge is not None
        return least([self.job.threat_model, *([ThreatModel.FEW_SHOT] if is_trained else [])])

    def is_open_to(self, owner: tuple[str, int] | None, model: ThreatModel, samples: int | None) -> bool:
        """Whether it is on what is so owned, and an attacker with so many labelled examples may do it."""
        has_examples = self.training is None or self.training.samples == samples
        return self.job.owner == owner and has_examples and model.may(self.threat_model, with_victim=owner is not None)

    @property
    def recovery(self) -> str | None:
        return None if self.job.variant is None else self.job.variant.recovery

    @property
    def kind(self) -> tuple[str | None, MergeEntry | None]:
        """The recovery and the merge."""
        return self.recovery, self.job.merge

    @property
    def cpu_seconds(self) -> float:
        """Of the recovery, of merging, training and scoring once; the search for the coefficients is not in it."""
        return self.validation.cpu_seconds + (0.0 if self.job.variant is None else self.job.variant.cpu_seconds)

    def describe(self) -> AttackRecord:
        return AttackRecord(
            recovery=self.recovery,
            merge=None if self.job.merge is None else self.job.merge.name,
            coefficients=self.point,
            uses_victim=self.job.variant is not None,
            start=self._start,
            samples=None if self.training is None else self.training.samples,
            learning_rate=None if self.training is None else float(self.training.learning_rates),
            **self._effort,
            cpu_seconds=round(self.cpu_seconds, 3),
        )

    @property
    def _start(self) -> str | None:
        """What a training without the victim starts from, where that is not a merge."""
        if self.job.merge is not None or self.job.variant is not None:
            return None
        (model,) = self.job.group.models
        return BASE if model == self.job.group.base else self.job.rider.name

    @property
    def _effort(self) -> dict[str, int | None]:
        """Steps of the training, or of what taught a student, and the most examples that were read for it."""
        if self.training is not None:
            return {"steps": self.training.steps, "examples": self.training.samples + self.own_examples}
        learnt = (self.job.variant.facts.get("learnt") if self.job.variant is not None else None) or {}
        return {name: learnt.get(name) for name in ("steps", "examples")}


Numbers = tuple[int, ...]
"""Of attacks in a contest."""


@dataclass(frozen=True)
class Contest:
    """All attacks on behalf of one free-rider, and its own model's credits on examples of its task.

    ``rider_alone`` are those on validation examples, ``rider_tested`` those on test examples. ``left`` are attacks that
    left the race: they count among what was tried, and nothing is chosen from them.
    """

    rider: str
    defended_task: str
    rider_task: str
    rider_alone: Credits
    rider_tested: Credits
    attacks: tuple[ScoredAttack, ...]
    left: tuple[ScoredAttack, ...] = ()

    def attacks_on(self, owner: tuple[str, int] | None, model: ThreatModel, samples: int | None = None) -> Numbers:
        """What an attacker with so many labelled examples may do to a protected model; None: without the victim."""
        return tuple(number for number, attack in enumerate(self.attacks) if attack.is_open_to(owner, model, samples))

    def menu_on(self, owner: tuple[str, int] | None, model: ThreatModel, samples: int | None = None) -> Numbers:
        """The same; of a release that nobody can merge, in any form, what running it gives away.

        Not to merge is no score of its own: whoever holds the weights can run them too.
        """
        numbers = self.attacks_on(owner, model, samples)
        if numbers or owner is None or not model.includes(ThreatModel.WHITE_BOX):
            return numbers
        return self.attacks_on(owner, ThreatModel.BLACK_BOX)

    def tried_on(
        self, owner: tuple[str, int] | None, model: ThreatModel, samples: int | None = None
    ) -> tuple[ScoredAttack, ...]:
        """The same with those that left the race."""
        tried = (*self.attacks, *self.left)
        return tuple(attack for attack in tried if attack.is_open_to(owner, model, samples))

    @cached_property
    def menu(self) -> Menu:
        cells = [(attack.validation, attack.test) for attack in self.attacks]
        return Menu.of(cells, self.defended_task, self.rider_task)

    @cached_property
    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean scores of all attacks on the defended task and on the free-rider's."""
        return self.menu.defended.mean(axis=1), self.menu.rider.mean(axis=1)

    def best(self, numbers: Numbers) -> ScoredAttack | None:
        """The attacker's choice among some attacks; None when none of them keeps the free-rider's skill."""
        defended, rider = (scores[list(numbers)] for scores in self.validation)
        chosen = choice(defended, rider, float(self.rider_alone.mean())) if numbers else None
        return None if chosen is None else self.attacks[numbers[chosen]]

    def cell(self, attack: ScoredAttack) -> CellRecord:
        protection, seed = attack.job.owner or (None, None)
        parts = {"validation": attack.validation, "test": attack.test}
        return CellRecord(
            protection=protection,
            seed=seed,
            rider=self.rider,
            tier=attack.threat_model,
            attack=attack.describe(),
            met=None if attack.validation.is_whole else attack.validation.met,
            scores={part: None if cell is None else self.scores(cell) for part, cell in parts.items()},
            credits=None if attack.test is None else {part: self._packed(cell) for part, cell in parts.items() if cell},
        )

    def _packed(self, cell: Cell) -> dict[str, str]:
        return {task: pack(cell.credits[task]) for task in (self.defended_task, self.rider_task)}

    @property
    def packed_rider(self) -> dict[str, str]:
        """The credits of the free-rider's own model, by part, as a result keeps them."""
        return {"validation": pack(self.rider_alone), "test": pack(self.rider_tested)}

    def kept_on_test(self, attack: ScoredAttack) -> float | None:
        """The share of the free-rider's skill that an attack keeps on test examples; None where it has none."""
        alone = float(self.rider_tested.mean())
        return None if attack.test is None or not alone else float(attack.test.credits[self.rider_task].mean()) / alone

    def is_at_edge(self, attack: ScoredAttack) -> bool:
        """Whether the search ended where it may not go further."""
        alike = (other.point for other in self.attacks if other.job == attack.job and other.training == attack.training)
        is_searched = (
            attack.job.variant is not None
            and attack.training is None
            and not (attack.job.merge and attack.job.merge.start)
        )
        return is_searched and is_on_edge(attack.point, alike)

    def is_recognised(self, owner: tuple[str, int], model: ThreatModel) -> bool:
        """Whether one of the recoveries that an attacker has undid what was done, or nothing was hidden."""
        distances = {
            variant.recovery: variant.facts.get("distance_before") for variant in self._variants((IDENTITY, 0), model)
        }
        return any(
            variant.keeps_basis or is_recognised(variant.facts, distances.get(variant.recovery))
            for variant in self._variants(owner, model)
        )

    def _variants(self, owner: tuple[str, int], model: ThreatModel) -> list[Variant]:
        return [
            attack.job.variant
            for number in self.attacks_on(owner, model)
            if (attack := self.attacks[number]).job.variant is not None
        ]

    def scores(self, cell: Cell) -> dict[str, float]:
        return {task: float(cell.credits[task].mean()) for task in (self.defended_task, self.rider_task)}


@dataclass(frozen=True)
class Judge:
    """Judges protections by what all free-riders' attacks score. ``alone``: scores of models that are not merged."""

    plan: AuditPlan
    contests: Sequence[Contest]
    alone: Mapping[str, Mapping[str, float]]

    def protections(self, released: Sequence[Variant]) -> dict[str, ProtectionResult]:
        """Every protection, from what was released under it; the unprotected expert comes first."""
        by_name: dict[str, list[Variant]] = {}
        for variant in released:
            by_name.setdefault(variant.protection, []).append(variant)
        expert = self.alone[released[0].label][self.plan.defended_task] if self.plan.has_expert else None
        return {name: self._protection(variants, expert) for name, variants in by_name.items()}

    def _protection(self, released: Sequence[Variant], expert: float | None) -> ProtectionResult:
        """``expert``: what the unprotected expert scores, None where nobody has it."""
        task, name, seeds = self.plan.defended_task, released[0].protection, [variant.seed for variant in released]
        base = self.alone[BASE][task]
        # What is planted computes what the expert does; in another structure it is not scored alone.
        scored = [self.alone[variant.label][task] for variant in released if variant.label in self.alone]
        protected = min(scored) if scored or expert is None else expert
        matrix = self._matrix(name, seeds)
        return ProtectionResult(
            is_control=name in CONTROLS,
            utility=Utility(expert=expert, protected=protected, loss=None if expert is None else expert - protected),
            tiers={
                model: self._verdicts(name, seeds, model)
                for model in self.plan.threat_models
                if model.merges or name == IDENTITY or name not in CONTROLS
            },
            excess=self._excess(name, seeds),
            matrix=tuple(matrix),
            drop_ratio=_drop_ratios(matrix, expert, base),
            fronts=tuple(self._fronts(contest, name, seeds[0]) for contest in self.contests),
        )

    def _verdicts(self, name: str, seeds: Sequence[int], model: ThreatModel) -> Verdicts:
        trials = tuple(
            _trial(contest, name, seed, model, samples, has_expert=self.plan.has_expert)
            for contest in self.contests
            for seed in seeds
            for samples in self._samples(model)
        )
        return Verdicts(worst=worst_trial(trials), trials=trials)

    def _samples(self, model: ThreatModel) -> Sequence[int | None]:
        if model is ThreatModel.RETRAIN:
            return self.plan.retrain.samples
        return self.plan.few_shot.samples if model.trains else (None,)

    def _excess(self, name: str, seeds: Sequence[int]) -> tuple[Excess, ...] | None:
        """What the weights give beyond running the release; None where the plan does not ask for both."""
        if not {ThreatModel.WHITE_BOX, ThreatModel.BLACK_BOX} <= {*self.plan.threat_models}:
            return None
        found = (_excess(contest, (name, seed)) for contest in self.contests for seed in seeds)
        return tuple(excess for excess in found if excess is not None)

    def _matrix(self, name: str, seeds: Sequence[int]) -> list[MatrixCell]:
        """The best test score of each recovery with each merge, over free-riders and keys."""
        recoveries = [entry for entry in self.plan.recoveries if self.plan.reaches(entry.threat_model)]
        merges = [merge for merge in self.plan.merges if self.plan.reaches(merge.threat_model)]
        strongest = self.plan.strongest
        attackers = {entry.name: strongest if entry.threat_model.merges else entry.threat_model for entry in recoveries}
        return [
            self._matrix_cell(name, seeds, recovery, merge, attackers.get(recovery or "", strongest))
            for recovery in (None, *attackers)
            for merge in merges
        ]

    def _matrix_cell(
        self, name: str, seeds: Sequence[int], recovery: str | None, merge: MergeEntry, attacker: ThreatModel
    ) -> MatrixCell:
        scores, attempts = [], 0
        for contest in self.contests:
            for seed in seeds:
                kind, owner = (recovery, merge), (name, seed)
                on_owner = contest.attacks_on(owner, attacker)
                numbers = tuple(number for number in on_owner if contest.attacks[number].kind == kind)
                tried = contest.tried_on(owner, attacker)
                attempts += sum(attack.kind == kind for attack in tried)
                best = contest.best(numbers)
                if best is not None and best.test is not None:
                    scores.append(contest.scores(best.test)[contest.defended_task])
        return MatrixCell(recovery=recovery, merge=merge.name, score=max(scores, default=None), attacks=attempts)

    def _fronts(self, contest: Contest, name: str, seed: int) -> Fronts:
        """Test scores of the strongest attacker's attacks that no other beats on both tasks, on validation examples."""
        model = self.plan.strongest
        samples = self._samples(model)[-1]
        return Fronts(
            rider=contest.rider,
            seed=seed,
            tier=model,
            samples=samples,
            unprotected=_front(contest, contest.attacks_on((IDENTITY, 0), model, samples)),
            protected=_front(contest, contest.attacks_on((name, seed), model, samples)),
            without_victim=_front(contest, contest.attacks_on(None, model, samples)),
        )


def _trial(
    contest: Contest, name: str, seed: int, model: ThreatModel, samples: int | None, *, has_expert: bool
) -> Trial:
    unprotected, protected, without = (
        contest.menu_on(owner, model, samples) for owner in ((IDENTITY, 0), (name, seed), None)
    )
    tried = contest.tried_on((name, seed), model, samples)
    if not has_expert:
        return _trial_without_expert(contest, seed, samples, (protected, without), tried)
    released, hidden, own = (contest.menu.only(numbers) for numbers in (unprotected, protected, without))
    at_bars, area = judged(released, hidden, own, contest.rider_alone, is_merging=model.merges)
    found = {one.kept_share: one for one in at_bars}
    worst = found[KEPT_SHARE]
    chosen = {
        "unprotected": contest.attacks[(*unprotected, *without)[worst.best_unprotected]],
        "protected": contest.attacks[(*protected, *without)[worst.best_protected]],
        "without_victim": contest.attacks[without[worst.best_reference]],
    }
    return Trial(
        rider=contest.rider,
        seed=seed,
        samples=samples,
        d_star=_number(worst.d_star),
        interval=_interval(worst),
        unprotected=worst.unprotected,
        protected=worst.protected,
        without_victim=worst.reference,
        is_denominator_small=worst.is_small,
        bars=tuple(
            AtBar(kept_share=bar, d_star=_number(one.d_star), interval=_interval(one)) for bar, one in found.items()
        ),
        area=_number(area),
        kept_on_test=contest.kept_on_test(chosen["protected"]),
        test_error=_number(worst.test_error),
        flags=tuple(_flags(contest, (name, seed), model, found, chosen)),
        attacks_tried=len(tried),
        search_cpu_seconds=round(sum(attack.cpu_seconds for attack in tried), 1),
        best={label: attack.describe() for label, attack in chosen.items()},
    )


def _trial_without_expert(
    contest: Contest, seed: int, samples: int | None, menus: tuple[Numbers, Numbers], tried: Sequence[ScoredAttack]
) -> Trial:
    """What attackers get with a release and without it (``menus``), where nobody has the expert to compare it with."""
    menu, (protected, without) = contest.menu, menus
    best, number = selected(menu.only((*protected, *without)), contest.rider_alone)
    reference, place = selected(menu.only(without), contest.rider_alone)
    chosen = {"protected": (*protected, *without)[number], "without_victim": without[place]}
    return Trial(
        rider=contest.rider,
        seed=seed,
        samples=samples,
        d_star=None,
        interval=(None, None),
        unprotected=None,
        protected=best,
        without_victim=reference,
        is_denominator_small=False,
        attacks_tried=len(tried),
        search_cpu_seconds=round(sum(attack.cpu_seconds for attack in tried), 1),
        best={label: contest.attacks[number].describe() for label, number in chosen.items()},
    )


def _excess(contest: Contest, owner: tuple[str, int]) -> Excess | None:
    """Best attack on weights less best attack that only runs the release; None where nobody ran it."""
    without = contest.attacks_on(None, ThreatModel.WHITE_BOX)
    weights, running = (contest.attacks_on(owner, model) for model in (ThreatModel.WHITE_BOX, ThreatModel.BLACK_BOX))
    if not running:
        return None
    first, second = (contest.menu.only((*numbers, *without)) for numbers in (weights, running))
    found = difference(first, second, contest.rider_alone)
    return Excess(
        rider=contest.rider,
        seed=owner[1],
        value=found.value,
        interval=(found.low, found.high),
        weights=found.first,
        black_box=found.second,
    )


def _interval(worst: WorstCase) -> tuple[float | None, float | None]:
    return _number(worst.low), _number(worst.high)


def _flags(
    contest: Contest,
    owner: tuple[str, int],
    model: ThreatModel,
    found: Mapping[float, WorstCase],
    chosen: Mapping[str, ScoredAttack],
) -> Iterator[Flag]:
    """What is to be held against a trial."""
    worst = found[KEPT_SHARE]
    if any(contest.is_at_edge(chosen[label]) for label in ("unprotected", "protected")):
        yield "edge"
    if model.includes(ThreatModel.WHITE_BOX) and not contest.is_recognised(owner, model):
        yield "not_recognised"
    if worst.denominator < STANDARD_ERRORS * worst.denominator_error:
        yield "uncertain_denominator"
    if len(contest.rider_alone) < FEWEST_EXAMPLES:
        yield "few_examples"
    if len({DStar(one.d_star, one.low, one.high).judgement for one in found.values()}) > 1:
        yield "bar_decides"


def worst_trial(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the lowest D*, among those with enough to defend if there are any.

    None when the victim adds nothing in any of them. Without the expert, the trial in which an attacker gets most.
    """
    if all(trial.unprotected is None for trial in trials):
        return max(trials, key=lambda trial: trial.protected, default=None)
    known = [(trial.d_star, trial) for trial in trials if trial.d_star is not None]
    enough = [(d_star, trial) for d_star, trial in known if not trial.is_denominator_small]
    return min(enough or known, key=lambda pair: pair[0], default=(None, None))[1]


def _drop_ratios(matrix: Sequence[MatrixCell], expert: float | None, base: float) -> dict[str, float | None]:
    """The published measure, per merge without recovery: (expert - merge) / (expert - base), the lowest found."""
    return {
        cell.merge: None
        if cell.score is None or expert is None or expert <= base
        else (expert - cell.score) / (expert - base)
        for cell in matrix
        if cell.recovery is None
    }


def _front(contest: Contest, numbers: Numbers) -> Front:
    tested = [(number, test) for number in numbers if (test := contest.attacks[number].test) is not None]
    defended, rider = (scores[[number for number, _ in tested]] for scores in contest.validation)
    chosen = [contest.scores(tested[place][1]) for place in pareto_front(defended, rider)]
    return tuple((scores[contest.defended_task], scores[contest.rider_task]) for scores in chosen)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
