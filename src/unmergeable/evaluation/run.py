"""The road of an audit: check the plan, make the models, sweep the attacks, test the contenders, judge.

    plan ── models: protected, recovered ── sweeps on validation examples ── contenders on test examples ── D*
                                                          └── the best of them, trained ────────────────────┘

Everything computed lies in the audit's folder under content-addressed names, so that the same command goes on after
whatever stopped it:

    DIR/models/    protected and recovered checkpoints
    DIR/cells/     scores
    DIR/analyses/  what :mod:`unmergeable.evaluation.analyses` measures
    DIR/audit.json the result
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unmergeable.checkpoint.disk import replace_file
from unmergeable.errors import BadInput
from unmergeable.evaluation.analyses import Surroundings, analyse, subjects_of
from unmergeable.evaluation.cells import Cell
from unmergeable.evaluation.judge import Attack, Contest, judge
from unmergeable.evaluation.lock import locked
from unmergeable.evaluation.models import Variant, make_variants
from unmergeable.evaluation.naming import named
from unmergeable.evaluation.plan import ExpertEntry, MethodEntry, Part, Plan, TaskEntry, Tier
from unmergeable.evaluation.plan_file import downloaded, read_plan
from unmergeable.evaluation.pool import Call, Pool, WorkerPool, run_all
from unmergeable.evaluation.preparation import environment, hashed, prepared, require_fine_tunes
from unmergeable.evaluation.ray_pool import RayPool
from unmergeable.evaluation.scoring import Checkpoint, Outcome, ScoredTask, Sweep, score_points, search, task_digest
from unmergeable.evaluation.search import Point, best_starts
from unmergeable.evaluation.tuning import Tuning, tune
from unmergeable.evaluation.worst_case import KEPT_SHARE, Menu, contenders
from unmergeable.progress import Progress, silent

RESULT = "audit.json"

_ADDED = MethodEntry("task_arithmetic", "task_arithmetic", {})


def audit(
    plan: Path, *, out: Path, workers: int | None = None, ray: str | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Audit protections against an attacker who knows about them.

    Interrupted or killed, the same call goes on: nothing that was computed is computed again.

    Args:
        plan: a YAML file (:mod:`unmergeable.evaluation.plan_file`).
        out: folder of the audit; created, or that of an earlier run.
        workers: processes; None for one per GPU, or per processor where there are no GPUs.
        ray: address of a Ray cluster to work on, or "local"; None for processes of this machine. The result depends on
            neither.
        progress: told of models made and sweeps done.

    Returns:
        What is written to ``out/audit.json``; docs/audit.md explains every entry.

    Raises:
        BadInput, UsageError: the plan, a checkpoint or the data cannot be used; before any compute where possible.
        NotEquivalent: a protection changed the function.
        CheckpointError: the disk is full or fails; what was done is kept.
    """
    parsed = downloaded(read_plan(plan.absolute()))  # actors of a cluster start in folders of their own
    require_fine_tunes(parsed.base, parsed.experts)
    with locked(prepared(out, "audit")):
        digests = hashed(parsed.paths, progress)
        with WorkerPool(workers) if ray is None else RayPool(ray, workers) as pool:
            document = _Auditor(parsed, out.resolve(), digests, pool, progress).run()
        replace_file(out / RESULT, (json.dumps(document, indent=1) + "\n").encode())
    return document


@dataclass(frozen=True)
class _Job:
    """A sweep and whose it is; ``variant`` is None where the victim is left alone."""

    variant: Variant | None
    rider: ExpertEntry
    sweep: Sweep

    @property
    def tier(self) -> Tier:
        """The lowest one whose attacker can do it."""
        tiers: tuple[Tier, Tier] = (
            "T0" if self.variant is None else self.variant.tier,
            "T0" if self.sweep.merge is None else self.sweep.merge.tier,
        )
        return max(tiers)


@dataclass(frozen=True)
class _Auditor:
    plan: Plan
    folder: Path
    digests: Mapping[Path, str]
    pool: Pool
    progress: Progress

    def run(self) -> dict[str, Any]:
        made = make_variants(self.plan, self.folder / "models", self.digests, self.progress)
        names = self._names(made)
        variants = [replace(variant, refusal=_without_paths(variant.refusal, names)) for variant in made]
        alone = self._alone(variants)
        jobs = [job for rider in self.plan.riders for job in self._jobs(variants, rider)]
        kept = {
            rider.name: KEPT_SHARE * float(alone["validation"][rider.name].credits[rider.task].mean())
            for rider in self.plan.riders
        }
        found = self._done(
            "sweeping",
            [(search, (job.sweep, self.plan.coefficients, kept[job.rider.name], self._cells)) for job in jobs],
        )
        attacks = self._tested(jobs, found, alone)
        trained, failures = self._trained(jobs, found, kept)
        lines = self._connections(variants)
        contests = [self._contest(rider, [*attacks, *trained], alone) for rider in self.plan.riders]
        document = judge(self.plan, contests, variants, alone_scores=self._alone_scores(alone), lines=lines)
        analyses = self._analyses(variants)
        refusals = [
            {**_describe(job), "reason": outcome.refusal}
            for job, outcome in zip(jobs, found, strict=True)
            if outcome.refusal
        ]
        refusals += failures
        refusals = [{**refusal, "reason": _without_paths(refusal["reason"], names)} for refusal in refusals]
        refusals += [
            {
                "protection": variant.protection,
                "seed": variant.seed,
                "recovery": variant.recovery,
                "reason": variant.refusal,
            }
            for variant in variants
            if variant.refusal
        ]
        return {
            "plan": self.plan.document,
            "environment": environment(),
            "digests": {path.name: digest for path, digest in self.digests.items()},
            "tasks": {task.name: {"kind": task.kind.name, **task.kind.facts()} for task in self.plan.tasks},
            **document,
            **({} if analyses is None else {"analyses": analyses}),
            "refused": refusals,
        }

    @property
    def _cells(self) -> Path:
        return self.folder / "cells"

    def _done(self, stage: str, calls: Sequence[Call], unit: str = "sweeps") -> list[Any]:
        """What all calls give, in their order."""
        return run_all(self.pool, calls, stage, unit, self.progress)

    def _checkpoint(self, path: Path) -> Checkpoint:
        return Checkpoint(path, self.digests[path])

    def _tasks(self, rider: ExpertEntry) -> tuple[ScoredTask, ScoredTask]:
        defended, other = (self.plan.task(name) for name in (self.plan.victim.task, rider.task))
        return self._scored(defended), self._scored(other)

    def _scored(self, entry: TaskEntry) -> ScoredTask:
        parts: list[Part] = ["validation", "test"] if entry.train is None else ["train", "validation", "test"]
        return ScoredTask(entry, {part: task_digest(entry, self.digests, part) for part in parts})

    def _sweep(self, victim: Checkpoint | None, rider: ExpertEntry, merge: MethodEntry | None) -> Sweep:
        return Sweep(self._checkpoint(self.plan.base), victim, self._checkpoint(rider.path), merge, self._tasks(rider))

    def _alone(self, variants: Iterable[Variant]) -> dict[str, dict[str, Cell]]:
        """Validation and test of models that are not merged: base, experts, and everything released."""
        first, *_ = self.plan.riders
        models: dict[str, Sweep] = {"base": self._sweep(self._checkpoint(self.plan.base), first, None)}
        for rider in self.plan.riders:
            models[rider.name] = self._sweep(None, rider, None)
        for variant in variants:
            if variant.recovery is None and variant.checkpoint is not None:
                models[variant.label] = self._sweep(variant.checkpoint, first, None)
        parts: tuple[Part, Part] = ("validation", "test")
        scored: dict[str, dict[str, Cell]] = {}
        for part in parts:
            calls: list[Call] = [(score_points, (sweep, [None], part, self._cells)) for sweep in models.values()]
            outcomes = self._done(f"scoring models alone, {part}", calls)
            for name, outcome in zip(models, outcomes, strict=True):
                if None not in outcome.cells:
                    raise BadInput(f"{name} cannot be scored: {outcome.refusal}")
            scored[part] = {name: outcome.cells[None] for name, outcome in zip(models, outcomes, strict=True)}
        return scored

    def _alone_scores(self, alone: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, float]]:
        """Mean test credit of models that are not merged, by model and task."""
        return {
            name: {task: float(found.mean()) for task, found in cell.credits.items()}
            for name, cell in alone["test"].items()
        }

    def _jobs(self, variants: Iterable[Variant], rider: ExpertEntry) -> list[_Job]:
        jobs = [_Job(None, rider, self._sweep(None, rider, _ADDED))]
        for variant in variants:
            if variant.checkpoint is not None:
                jobs += [
                    _Job(variant, rider, self._sweep(variant.checkpoint, rider, merge))
                    for merge in self.plan.merges
                    if self.plan.reaches(merge.tier)
                ]
        return jobs

    def _tested(
        self, jobs: Sequence[_Job], found: Sequence[Outcome], alone: Mapping[str, Mapping[str, Cell]]
    ) -> list[Attack]:
        """All attacks; those that a selection may pick with their test."""
        without = {
            job.rider.name: _menu(job, outcome.cells)
            for job, outcome in zip(jobs, found, strict=True)
            if job.variant is None
        }
        wanted: list[list[Point | None]] = []
        for job, outcome in zip(jobs, found, strict=True):
            points = list(outcome.cells)
            rider_alone = alone["validation"][job.rider.name].credits[job.rider.task]
            if not points:
                wanted.append([])
                continue
            if job.variant is None:
                wanted.append(points)
                continue
            numbers = contenders(_menu(job, outcome.cells), without[job.rider.name], rider_alone)
            wanted.append([points[number] for number in numbers])
        tested = self._done(
            "testing contenders",
            [
                (score_points, (job.sweep, points, "test", self._cells))
                for job, points in zip(jobs, wanted, strict=True)
            ],
        )
        return [
            Attack(job.variant, job.rider.name, job.sweep.merge, point, cell, test.cells.get(point))
            for job, outcome, test in zip(jobs, found, tested, strict=True)
            for point, cell in outcome.cells.items()
        ]

    def _trained(
        self, jobs: Sequence[_Job], found: Sequence[Outcome], kept: Mapping[str, float]
    ) -> tuple[list[Attack], list[dict[str, Any]]]:
        """Attacks that train the best merges on labelled examples, and those that came to nothing."""
        if not self.plan.reaches("T2"):
            return [], []
        wanted = [
            (job, Tuning(job.sweep, point, method))
            for job, point in self._starts(jobs, found, kept)
            for samples in self.plan.few_shot.samples
            for method in self.plan.few_shot.methods(samples)
        ]
        calls: list[Call] = [(tune, (tuning, self._cells)) for _, tuning in wanted]
        attacks, failures = [], []
        for (job, tuning), tuned in zip(wanted, self._done("training merges", calls, "trainings"), strict=True):
            if tuned.cells is None:
                failures.append({**_describe(job), **tuning.describe(), "reason": tuned.refusal})
                continue
            cells = tuned.cells["validation"], tuned.cells["test"]
            attacks.append(
                Attack(job.variant, job.rider.name, job.sweep.merge, tuning.point, *cells, training=tuning.method)
            )
        return attacks, failures

    def _starts(
        self, jobs: Sequence[_Job], found: Sequence[Outcome], kept: Mapping[str, float]
    ) -> list[tuple[_Job, Point | None]]:
        """The merges to train: for each free-rider as many of each model, and of what it has without the victim.

        An attacker of tier T3 starts from the best that it has, and has all that one of tier T2 has besides.
        """
        groups: dict[tuple[str, tuple[str, int] | None, Tier], list[int]] = {}
        tiers: tuple[Tier, ...] = ("T2", "T3")
        for tier in (tier for tier in tiers if self.plan.reaches(tier)):
            for number, job in enumerate(jobs):
                if job.tier <= tier:
                    owner = None if job.variant is None else (job.variant.protection, job.variant.seed)
                    groups.setdefault((job.rider.name, owner, tier), []).append(number)
        chosen: dict[tuple[int, Point | None], None] = {}
        for (rider, _, _), numbers in groups.items():
            scores = [_means(jobs[number], found[number].cells) for number in numbers]
            starts = best_starts(scores, kept[rider], self.plan.few_shot.starts)
            chosen |= dict.fromkeys((numbers[place], point) for place, point in starts)
        return [(jobs[number], point) for number, point in chosen]

    def _contest(
        self, rider: ExpertEntry, attacks: Sequence[Attack], alone: Mapping[str, Mapping[str, Cell]]
    ) -> Contest:
        return Contest(
            rider=rider.name,
            defended_task=self.plan.victim.task,
            rider_task=rider.task,
            rider_alone=alone["validation"][rider.name].credits[rider.task],
            attacks=tuple(attack for attack in attacks if attack.rider == rider.name),
        )

    def _analyses(self, variants: Sequence[Variant]) -> dict[str, Any] | None:
        """Why the figures are what they are, where the plan asks for it."""
        if self.plan.analyses is None:
            return None
        around = Surroundings(
            self._checkpoint(self.plan.base),
            self._checkpoint(self.plan.victim.path),
            tuple((rider.name, self._checkpoint(rider.path)) for rider in self.plan.riders),
            self._scored(self.plan.task(self.plan.victim.task)),
            self.plan.analyses,
        )
        return analyse(subjects_of(variants), around, self.folder / "analyses", self.pool, self.progress)

    def _names(self, variants: Iterable[Variant]) -> dict[str, str]:
        """What lies where."""
        names = {str(expert.path): expert.name for expert in self.plan.experts}
        names[str(self.plan.base)] = "the base"
        return names | {str(v.checkpoint.path): v.label for v in variants if v.checkpoint is not None}

    def _connections(self, variants: Iterable[Variant]) -> list[dict[str, Any]]:
        """Scores on the line from each free-rider's model to each variant, whose ends are the two, on test examples."""
        if not self.plan.connectivity:
            return []
        chosen = [
            (variant, rider) for rider in self.plan.riders for variant in variants if variant.checkpoint is not None
        ]
        last = self.plan.connectivity - 1
        shares = [number / last for number in range(last + 1)]
        calls = [self._line(variant, rider, shares[1:-1]) for variant, rider in chosen]
        done = iter(self._done("measuring connectivity", [call for line in calls for call in line]))
        lines = [[cell for _ in line for cell in next(done).cells.values()] for line in calls]
        return [
            {
                "protection": variant.protection,
                "seed": variant.seed,
                "recovery": variant.recovery,
                "rider": rider.name,
                "share": shares,
                "scores": {
                    task: [float(cell.credits[task].mean()) for cell in cells]
                    for task in (self.plan.victim.task, rider.task)
                },
            }
            for (variant, rider), cells in zip(chosen, lines, strict=True)
            if len(cells) == len(shares)  # a model of another structure has no line to it
        ]

    def _line(self, variant: Variant, rider: ExpertEntry, shares: Sequence[float]) -> list[Call]:
        """Calls that score a line's ends as the models they are, and what lies between as shares of the variant."""
        between: list[Point | None] = [(share, 1 - share) for share in shares]
        parts = (
            (self._sweep(None, rider, None), [None]),
            (self._sweep(variant.checkpoint, rider, _ADDED), between),
            (self._sweep(variant.checkpoint, rider, None), [None]),
        )
        return [(score_points, (sweep, points, "test", self._cells)) for sweep, points in parts]


def _menu(job: _Job, cells: Mapping[Point | None, Cell]) -> Menu:
    """A menu whose attacks have no test yet."""
    defended, rider = (np.array([cell.credits[task.entry.name] for cell in cells.values()]) for task in job.sweep.tasks)
    return Menu(defended, rider, np.full((len(cells), 1), np.nan))


def _means(job: _Job, cells: Mapping[Point | None, Cell]) -> dict[Point | None, tuple[float, float]]:
    """Mean credits on the defended task and on the free-rider's."""
    defended, rider = (task.entry.name for task in job.sweep.tasks)
    return {
        point: (float(cell.credits[defended].mean()), float(cell.credits[rider].mean()))
        for point, cell in cells.items()
    }


def _without_paths(reason: str, names: Mapping[str, str]) -> str:
    """The reason without the model that it begins with, which is told beside it."""
    for path in names:
        reason = reason.removeprefix(f"{path}: ")
    return named(reason, names)


def _describe(job: _Job) -> dict[str, Any]:
    merge = None if job.sweep.merge is None else job.sweep.merge.name
    if job.variant is None:
        return {"protection": None, "rider": job.rider.name, "merge": merge}
    return {
        "protection": job.variant.protection,
        "seed": job.variant.seed,
        "recovery": job.variant.recovery,
        "rider": job.rider.name,
        "merge": merge,
    }
