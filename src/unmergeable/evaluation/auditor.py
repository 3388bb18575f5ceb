"""The steps of an audit, from a plan to its result.

plan ── models: protected, recovered ── search on validation examples ── contenders on test examples ── D*
                                                      └── the best of them, trained ────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unmergeable.data import Part
from unmergeable.errors import BadInput
from unmergeable.evaluation.alike import scored_once
from unmergeable.evaluation.analyses import Analyses, Surroundings, analyse, subjects_of
from unmergeable.evaluation.cells import Cell, Credits
from unmergeable.evaluation.contending import Searched, points_to_test
from unmergeable.evaluation.controls import controls, doubted
from unmergeable.evaluation.heats import Heats
from unmergeable.evaluation.judge import Contest, Job, Judge, ScoredAttack
from unmergeable.evaluation.methods import is_sum
from unmergeable.evaluation.models import Variant, make_variants
from unmergeable.evaluation.names import BASE, NOT_THE_EXPERT, PLANTED_STRUCTURE, SCALE
from unmergeable.evaluation.plans.audit_plan import AuditPlan
from unmergeable.evaluation.plans.entries import ExpertEntry, MergeEntry
from unmergeable.evaluation.preflight import asked
from unmergeable.evaluation.results import AuditResult, Line, ModelRecord, Refusal, SearchPrecision
from unmergeable.evaluation.run import Run
from unmergeable.evaluation.scoring import Checkpoint, Coefficients, Group, Outcome, score_points
from unmergeable.evaluation.search import best_starts
from unmergeable.evaluation.selection import KEPT_SHARE, skill_to_keep
from unmergeable.evaluation.stages import by_part, first_merges, other_merges
from unmergeable.evaluation.threat_models import ThreatModel, least
from unmergeable.evaluation.tuning import Tuning, tune
from unmergeable.network.precision import FULL
from unmergeable.pools.pool import Call

_ADDED = MergeEntry("task_arithmetic", "task_arithmetic", {})

_MEASURED = (
    "distance_before", "distance_after", "confidence", "measured_block_error", "condition_bound", "findings",
    "distance_with_key", "output_gap", "output_gap_bound", "planted",
)  # fmt: skip


@dataclass(frozen=True)
class _Alone:
    """Models that are not merged, by name: the base, the experts, and what was released."""

    validation: Mapping[str, Cell]
    test: Mapping[str, Cell]

    def rider(self, rider: ExpertEntry) -> Credits:
        """Credits of a free-rider's own model on validation examples of its task."""
        return self.validation[rider.name].credits[rider.task]

    def scores(self) -> dict[str, dict[str, float]]:
        return {
            name: {task: float(credited.mean()) for task, credited in cell.credits.items()}
            for name, cell in self.test.items()
        }


@dataclass(frozen=True)
class Auditor:
    """A plan at work."""

    run: Run
    plan: AuditPlan

    def result(self) -> AuditResult:
        every = make_variants(self.plan, self.run.models, self.run.digests, self.run.progress)
        made = scored_once(every, self.plan.base, self.run.progress)
        variants = [replace(variant, refusal=self._without_paths(variant.refusal, made)) for variant in made]
        alone = self._alone(variants)
        searched = self._searched(variants, alone)
        attacks = self._tested(searched, alone)
        left = [
            ScoredAttack(merges.job, point, cell, None)
            for merges in searched
            for point, cell in merges.found.left.items()
        ]
        if self.plan.search_precision != FULL:  # nothing is chosen by rounded credits
            left += [attack for attack in attacks if attack.test is None]
            attacks = [attack for attack in attacks if attack.test is not None]
        trained, failures = self._trained(searched, alone)
        retrained, unlearnt = self._retrained(variants, searched, alone)
        trained += retrained
        stayed = [attack for attack in [*attacks, *trained] if attack.validation.is_whole]
        left += [attack for attack in trained if not attack.validation.is_whole]
        lines = self._connections(variants)
        exact = self._in_float32(alone)
        contests = [self._contest(rider, stayed, left, exact) for rider in self.plan.riders]
        released = [variant for variant in variants if variant.recovery is None and variant.checkpoint is not None]
        protections = Judge(self.plan, contests, alone.scores()).protections(released)
        checked = controls(protections, variants) if self.plan.has_expert else ()
        analyses = self._analyses(variants)
        refused = [_refusal(done.job, done.found.refusal) for done in searched if done.found.refusal]
        refused = [
            replace(refusal, reason=self._without_paths(refusal.reason, made))
            for refusal in [*refused, *failures, *unlearnt]
        ]
        refused += [
            Refusal(
                protection=variant.protection,
                seed=variant.seed,
                recovery=variant.recovery,
                rider=variant.rider,
                reason=variant.refusal,
            )
            for variant in variants
            if variant.refusal
        ]
        return AuditResult(
            **self.run.facts(),
            task=self.plan.defended_task,
            kept_share=KEPT_SHARE,
            alone=alone.scores(),
            protections=doubted(protections) if any(control.undecided for control in checked) else protections,
            models=tuple(_model(variant) for variant in variants),
            connectivity=tuple(lines),
            controls=checked,
            passed=all(control.passed for control in checked),
            cells=tuple(contest.cell(attack) for contest in contests for attack in (*contest.attacks, *contest.left)),
            riders={contest.rider: contest.packed_rider for contest in contests},
            analyses=analyses,
            refused=tuple(refused),
            search=self._search_precision(alone, exact),
        )

    def _in_float32(self, alone: _Alone) -> _Alone:
        """With what attackers are compared with, the base and the free-riders' models, scored in float32 throughout."""
        if self.plan.search_precision == FULL:
            return alone
        models = {name: replace(group, search_precision=FULL) for name, group in self._given().items()}
        return replace(alone, validation={**alone.validation, **self._scored(models, "validation")})

    def _search_precision(self, alone: _Alone, exact: _Alone) -> SearchPrecision | None:
        """How far from float32 attackers search, on the base and the free-riders' models."""
        plan = self.plan
        if plan.search_precision == FULL:
            return None
        differences = [
            alone.validation[name].credits[task] - credited
            for name in self._given()
            for task, credited in exact.validation[name].credits.items()
        ]
        return SearchPrecision(
            plan.search_precision,
            float(np.mean(np.concatenate(differences) != 0)),
            max(abs(float(difference.mean())) for difference in differences),
        )

    def _without_paths(self, reason: str, variants: Sequence[Variant]) -> str:
        """The reason without the model that it begins with, which is named beside it."""
        read = [self.plan.base, *(expert.path for expert in self.plan.experts)]
        for path in [*read, *(v.checkpoint.path for v in variants if v.checkpoint is not None)]:
            reason = reason.removeprefix(f"{path}: ")
        return self.run.without_paths(reason, [(variant.label, variant) for variant in variants])

    def _group(self, rider: ExpertEntry, *models: Checkpoint, merge: MergeEntry | None = None) -> Group:
        """Models to merge, or one that is scored as it is, on the defended task and a free-rider's."""
        tasks = tuple(self.run.scored(self.plan.task(name)) for name in (self.plan.defended_task, rider.task))
        return Group(self.run.checkpoint(self.plan.base), models, merge, tasks, self.plan.search_precision)

    def _released(self, variant: Variant) -> Group:
        """What was released, to be scored as it is; what was made elsewhere knows the defended task only."""
        assert variant.checkpoint is not None
        if not variant.checkpoint.is_foreign:
            return self._group(self.plan.riders[0], variant.checkpoint)
        release = next(release for release in self.plan.releases if release.name == variant.protection)
        task, model = asked(self.plan, release, self.run.digests, self.run.scored)
        return Group(self.run.checkpoint(self.plan.base), (model,), None, (task,), self.plan.search_precision)

    def _given(self) -> dict[str, Group]:
        """The base and the free-riders' models as they are."""
        models = {BASE: self._group(self.plan.riders[0], self.run.checkpoint(self.plan.base))}
        return models | {rider.name: self._group(rider, self.run.checkpoint(rider.path)) for rider in self.plan.riders}

    def _alone(self, variants: Iterable[Variant]) -> _Alone:
        models = self._given()
        for variant in variants:
            if variant.recovery is None and variant.checkpoint is not None and variant.protection != PLANTED_STRUCTURE:
                models[variant.label] = self._released(variant)
        return _Alone(self._scored(models, "validation"), self._scored(models, "test"))

    def _scored(self, models: Mapping[str, Group], part: Part) -> dict[str, Cell]:
        calls: list[Call] = [(score_points, (group, [None], part, self.run.cells)) for group in models.values()]
        outcomes = self.run.done(f"scoring models alone, {part}", calls, "models")
        for name, outcome in zip(models, outcomes, strict=True):
            if None not in outcome.cells:
                raise BadInput(f"{name} cannot be scored: {outcome.refusal}")
        return {name: outcome.cells[None] for name, outcome in zip(models, outcomes, strict=True)}

    def _jobs(self, variants: Sequence[Variant], rider: ExpertEntry) -> list[Job]:
        """The first stage of a free-rider's attacks, those that leave the victim alone first.

        What a merge makes of its own model and the base is had without the victim, too: trimming it may help.
        """
        base, own = self.run.checkpoint(self.plan.base), self.run.checkpoint(rider.path)
        jobs = [Job(None, rider, _ADDED, self._group(rider, own, merge=_ADDED))]
        jobs += [
            Job(None, rider, merge, self._group(rider, base, own, merge=merge))
            for merge in self.plan.merges
            if not is_sum(merge.method) and self.plan.reaches(merge.threat_model)
        ]
        for variant in variants:
            if variant.checkpoint is not None and variant.is_had_by(rider):
                jobs += [
                    self._job(variant, rider, merge)
                    for merge in first_merges(self.plan.attacker, variant, self.plan.merges)
                    if self._goes_together(variant, merge)
                ]
        return jobs

    def _job(self, variant: Variant, rider: ExpertEntry, merge: MergeEntry) -> Job:
        assert variant.checkpoint is not None
        own = self.run.checkpoint(rider.path)
        return Job(variant, rider, merge, self._group(rider, variant.checkpoint, own, merge=merge))

    def _goes_together(self, variant: Variant, merge: MergeEntry) -> bool:
        """Whether some attacker has both; who does not merge the release itself has ordinary tools."""
        if not variant.threat_model.merges:
            return merge.threat_model is ThreatModel.OFF_THE_SHELF
        return self.plan.reaches(merge.threat_model)

    def _kept(self, rider: ExpertEntry, alone: _Alone) -> float:
        return skill_to_keep(float(alone.rider(rider).mean()))

    def _searched(self, variants: Sequence[Variant], alone: _Alone) -> list[Searched]:
        kept = {rider.name: self._kept(rider, alone) for rider in self.plan.riders}
        jobs = [job for rider in self.plan.riders for job in self._jobs(variants, rider)]
        searched = self._raced(jobs, [], alone)
        if self.plan.attacker.combines == "best":
            searched = self._raced(self._following(other_merges(searched, self.plan.merges, kept)), searched, alone)
        if self.plan.attacker.by_part:
            searched = self._raced(self._following(by_part(searched, kept)), searched, alone)
        return searched

    def _following(self, wanted: Iterable[tuple[Job, MergeEntry]]) -> list[Job]:
        """Jobs of a later stage: another merge of a model that was merged before."""
        return [
            self._job(job.variant, job.rider, merge)
            for job, merge in wanted
            if job.variant is not None and self._goes_together(job.variant, merge)
        ]

    def _raced(self, jobs: Sequence[Job], before: Sequence[Searched], alone: _Alone) -> list[Searched]:
        """What was found before, and then these jobs."""
        if not jobs:
            return list(before)
        every = [*(done.job for done in before), *jobs]
        known = dict(enumerate(done.found for done in before))
        found = replace(self._heats(every, alone), known=known).searched()
        return [Searched(*pair) for pair in zip(every, found, strict=True)]

    def _heats(self, jobs: Sequence[Job], alone: _Alone) -> Heats:
        return Heats(self.run, self.plan.coefficients, self.plan.doubt, jobs, self._own(alone))

    def _own(self, alone: _Alone) -> dict[str, Credits]:
        """What each free-rider's own model scores on its task, by its name."""
        return {rider.name: alone.rider(rider) for rider in self.plan.riders}

    def _tested(self, searched: Sequence[Searched], alone: _Alone) -> list[ScoredAttack]:
        """All attacks; those that a selection may pick with their test."""
        wanted = points_to_test(searched, self.plan.threat_models, self._own(alone))
        tested = self._contending("testing contenders", searched, wanted, "test")
        if self.plan.search_precision == FULL:
            chosen_by = [merges.found.cells for merges in searched]
        else:  # rounding would decide who keeps enough of the free-rider's skill
            exact = self._contending("scoring contenders in float32", searched, wanted, "validation")
            chosen_by = [{**merges.found.cells, **o.cells} for merges, o in zip(searched, exact, strict=True)]
        return [
            ScoredAttack(merges.job, point, cell, test.cells.get(point))
            for merges, cells, test in zip(searched, chosen_by, tested, strict=True)
            for point, cell in cells.items()
        ]

    def _contending(
        self, stage: str, searched: Sequence[Searched], wanted: Sequence[Sequence[Coefficients | None]], part: Part
    ) -> list[Outcome]:
        """The points of each job, scored in float32."""
        calls: list[Call] = [
            (score_points, (replace(merges.job.group, search_precision=FULL), points, part, self.run.cells))
            for merges, points in zip(searched, wanted, strict=True)
        ]
        return self.run.done(stage, calls, "merges")

    def _trained(self, searched: Sequence[Searched], alone: _Alone) -> tuple[list[ScoredAttack], list[Refusal]]:
        """Attacks that train the best merges on labelled examples, and those that came to nothing."""
        if not self.plan.strongest.trains:
            return [], []
        wanted = [
            (job, Tuning(job.group, point, method))
            for job, point in self._starts(searched, alone)
            for samples in self.plan.few_shot.samples
            for method in self.plan.few_shot.methods(samples)
        ]
        return self._tuned("training merges", wanted, searched, alone)

    def _retrained(
        self, variants: Sequence[Variant], searched: Sequence[Searched], alone: _Alone
    ) -> tuple[list[ScoredAttack], list[Refusal]]:
        """Attacks that train a free-rider's task into a release, and equally into models without the victim."""
        if not self.plan.reaches(ThreatModel.RETRAIN):
            return [], []
        released = [
            (variant, variant.checkpoint)
            for variant in variants
            if variant.recovery is None and variant.protection not in NOT_THE_EXPERT
        ]
        entry = self.plan.retrain
        wanted = []
        for rider in self.plan.riders:
            without = [(None, self.run.checkpoint(path)) for path in (rider.path, self.plan.base)]
            jobs = [
                Job(variant, rider, None, self._group(rider, checkpoint))
                for variant, checkpoint in (*without, *released)
                if checkpoint is not None
            ]
            wanted += [
                (job, Tuning(job.group, None, method, entry.own_examples))
                for job in jobs
                for samples in entry.samples
                for method in entry.methods(samples)
            ]
        return self._tuned("training releases", wanted, searched, alone)

    def _tuned(
        self, stage: str, wanted: Sequence[tuple[Job, Tuning]], searched: Sequence[Searched], alone: _Alone
    ) -> tuple[list[ScoredAttack], list[Refusal]]:
        """Trainings that were done, and those that came to nothing."""
        heats = self._heats([merges.job for merges in searched], alone)
        found = {number: merges.found for number, merges in enumerate(searched)}
        calls: list[Call] = [
            (tune, (tuning, heats.rules(job, found, _trainer(job)), self.run.cells)) for job, tuning in wanted
        ]
        attacks, failures = [], []
        for (job, tuning), tuned in zip(wanted, self.run.done(stage, calls, "trainings") if calls else (), strict=True):
            if tuned.cells is None:
                method = tuning.method
                rate = float(method.learning_rates)
                failures.append(_refusal(job, tuned.refusal, samples=method.samples, learning_rate=rate))
                continue
            cells = tuned.cells["validation"], tuned.cells.get("test")
            attacks.append(ScoredAttack(job, tuning.point, *cells, tuning.method, tuning.most_own))
        return attacks, failures

    def _starts(self, searched: Sequence[Searched], alone: _Alone) -> list[tuple[Job, Coefficients | None]]:
        """The merges to train: for each free-rider as many of each model, and of what it has without the victim.

        Each attacker who trains starts from the best that it has.
        """
        groups: dict[tuple[str, tuple[str, int] | None, ThreatModel], list[int]] = {}
        for model in (model for model in ThreatModel if model.trains and model.merges and self.plan.reaches(model)):
            for number, merges in enumerate(searched):
                if model.includes(merges.job.threat_model):
                    groups.setdefault((merges.job.rider.name, merges.job.owner, model), []).append(number)
        chosen: dict[tuple[int, Coefficients | None], None] = {}
        for (rider, _, _), numbers in groups.items():
            scores = [searched[number].found.scores for number in numbers]
            kept = self._kept(self.plan.expert(rider), alone)
            starts = best_starts(scores, kept, self.plan.few_shot.starts)
            chosen |= dict.fromkeys((numbers[place], point) for place, point in starts)
        return [(searched[number].job, point) for number, point in chosen]

    def _contest(
        self, rider: ExpertEntry, attacks: Sequence[ScoredAttack], left: Sequence[ScoredAttack], alone: _Alone
    ) -> Contest:
        return Contest(
            rider=rider.name,
            defended_task=self.plan.defended_task,
            rider_task=rider.task,
            rider_alone=alone.rider(rider),
            rider_tested=alone.test[rider.name].credits[rider.task],
            attacks=tuple(attack for attack in attacks if attack.job.rider == rider),
            left=tuple(attack for attack in left if attack.job.rider == rider),
        )

    def _analyses(self, variants: Sequence[Variant]) -> Analyses | None:
        """Why the figures are what they are, where the plan asks for it."""
        if self.plan.analyses is None:
            return None
        around = Surroundings(
            self.run.checkpoint(self.plan.base),
            self.run.checkpoint(self.plan.victim.path),
            tuple((rider.name, self.run.checkpoint(rider.path)) for rider in self.plan.riders),
            self.run.scored(self.plan.task(self.plan.defended_task)),
            self.plan.analyses,
        )
        subjects = subjects_of(variants)
        return analyse(subjects, around, self.run.folder / "analyses", self.run.pool, self.run.progress)

    def _connections(self, variants: Iterable[Variant]) -> list[Line]:
        """Scores on the line from each free-rider's model to each variant, whose ends are the two, on test examples."""
        if not self.plan.connectivity:
            return []
        chosen = [
            (variant, rider)
            for rider in self.plan.riders
            for variant in variants
            if variant.checkpoint is not None
            and variant.is_had_by(rider)
            and variant.protection not in set(NOT_THE_EXPERT) - {SCALE}
        ]
        last = self.plan.connectivity - 1
        shares = [number / last for number in range(last + 1)]
        calls = [self._line(variant.checkpoint, rider, shares[1:-1]) for variant, rider in chosen if variant.checkpoint]
        done = iter(self.run.done("measuring connectivity", [call for line in calls for call in line], "merges"))
        lines = [[cell for _ in line for cell in next(done).cells.values()] for line in calls]
        return [
            Line(
                protection=variant.protection,
                seed=variant.seed,
                recovery=variant.recovery,
                rider=rider.name,
                share=tuple(shares),
                scores={
                    task: tuple(float(cell.credits[task].mean()) for cell in cells)
                    for task in (self.plan.defended_task, rider.task)
                },
            )
            for (variant, rider), cells in zip(chosen, lines, strict=True)
            if len(cells) == len(shares)  # a model of another structure has no line to it
        ]

    def _line(self, model: Checkpoint, rider: ExpertEntry, shares: Sequence[float]) -> list[Call]:
        """Calls that score a line's ends as the models they are, and what lies between as shares of the model."""
        own = self.run.checkpoint(rider.path)
        inside = [(share, 1 - share) for share in shares]
        parts: list[tuple[Group, list[Coefficients | None]]] = [(self._group(rider, own), [None])]
        if model.is_foreign:  # alone it is a network of its own, which need not know the free-rider's task
            parts += [(self._group(rider, model, own, merge=_ADDED), [*inside, (1.0, 0.0)])]
        else:
            parts += [(self._group(rider, model, own, merge=_ADDED), [*inside])]
            parts += [(self._group(rider, model), [None])]
        return [(score_points, (group, points, "test", self.run.cells)) for group, points in parts]


def _trainer(job: Job) -> ThreatModel:
    """That of the weakest attacker who can train what a job gives."""
    return job.threat_model if job.merge is None else least([job.threat_model, ThreatModel.FEW_SHOT])


def _refusal(job: Job, reason: str, **training: Any) -> Refusal:
    """That a merge, or the training after it, came to nothing."""
    protection, seed = job.owner or (None, None)
    return Refusal(
        protection=protection,
        seed=seed,
        recovery=None if job.variant is None else job.variant.recovery,
        rider=job.rider.name,
        merge=None if job.merge is None else job.merge.name,
        reason=reason,
        **training,
    )


def _model(variant: Variant) -> ModelRecord:
    return ModelRecord(
        protection=variant.protection,
        seed=variant.seed,
        recovery=variant.recovery,
        rider=variant.rider,
        cpu_seconds=variant.cpu_seconds,
        refusal=variant.refusal,
        facts={name: variant.facts[name] for name in _MEASURED if name in variant.facts},
    )
