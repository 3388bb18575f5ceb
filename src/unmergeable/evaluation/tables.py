"""A table: check the plan, make the models, merge every group of them, take averages.

Interrupted or killed, the same call resumes (:mod:`unmergeable.evaluation.run` says what lies where).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unmergeable.checkpoint.disk import replace_file
from unmergeable.errors import BadInput
from unmergeable.evaluation.cells import Cell
from unmergeable.evaluation.models import ModelMaker, Variant
from unmergeable.evaluation.plans.entries import MergeEntry, ProtectionEntry, RecoveryEntry
from unmergeable.evaluation.plans.table_plan import TablePlan, VariantName, read_table_plan
from unmergeable.evaluation.report.table_page import page
from unmergeable.evaluation.run import Run, begun
from unmergeable.evaluation.scoring import Checkpoint, Coefficients, Group, score_points
from unmergeable.evaluation.table_results import Alone, ModelScores, TableCell, TableResult
from unmergeable.evaluation.table_scores import Place, averages, figures, rounded
from unmergeable.pools.pool import Call, WorkerPool
from unmergeable.progress import Progress, silent

RESULT, PAGE = "table.json", "table.md"


def table(
    plan: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> TableResult:
    """Score merges of protected experts with fixed settings, as a paper's table does.

    Interrupted or killed, the same call resumes: nothing that was computed is computed again.

    Args:
        plan: a YAML file (:mod:`unmergeable.evaluation.plans.table_plan`).
        out: output directory; created, or that of an earlier run.
        root: where the relative paths of the plan start; its folder when None.
        workers: processes; None for one per GPU, or per processor where there are no GPUs. The result does not depend
            on it.
        progress: called as models are made and groups scored.

    Returns:
        What is written to ``out/table.json``; ``out/table.md`` is the same to read.

    Raises:
        BadInput, UsageError: the plan, a checkpoint or the data cannot be used; before any compute where possible.
        NotEquivalent: a protection changed the function.
        CheckpointError: the disk is full or fails; what was done is kept.
    """
    parsed = read_table_plan(Path(plan).absolute(), None if root is None else Path(root).absolute()).downloaded()
    out = Path(out)
    with begun(parsed, out, "table", partial(WorkerPool, workers), progress) as run:
        _require_different(parsed, run.digests)
        result = _Tabulator(run, parsed).result()
        replace_file(out / RESULT, (json.dumps(result.to_json(), indent=1) + "\n").encode())
        replace_file(out / PAGE, page(result).encode())
    return result


def _require_different(plan: TablePlan, digests: Mapping[Path, str]) -> None:
    """Experts that are one checkpoint would be made at the same time, in the same place."""
    names: dict[str, str] = {}
    for expert in plan.experts:
        other = names.setdefault(digests[expert.path], expert.name)
        if other != expert.name:
            raise BadInput(f"experts {other} and {expert.name} are the same checkpoint; leave one of them out.")


@dataclass(frozen=True)
class Scored:
    """A merge on test examples. ``coefficient`` is the one that was chosen, where there was a choice."""

    cell: Cell
    coefficient: float | None = None


def score_group(group: Group, folder: Path) -> Scored | str:
    """A group on test examples, with the coefficient that does best on validation examples where there are several.

    Returns:
        The scores, or why the group does not merge.

    Raises:
        BadInput: data or checkpoints cannot be read.
        CheckpointError: a cell cannot be written.
    """
    grid = () if group.merge is None else group.merge.coefficients
    points: list[Coefficients | None] = [(value,) * len(group.models) for value in grid] or [None]
    if len(points) > 1:
        validated = score_points(group, points, "validation", folder)
        if not validated.cells:
            return validated.refusal
        # Of equal ones the smallest; all tasks count alike.
        points = [max(validated.cells, key=lambda point: _mean(validated.cells[point]))]
    outcome = score_points(group, points, "test", folder)
    (point,) = points
    if point not in outcome.cells:
        return outcome.refusal
    return Scored(outcome.cells[point], point[0] if point is not None and len(grid) > 1 else None)


def make_models(
    maker: ModelMaker, protections: Sequence[ProtectionEntry], recoveries: Sequence[RecoveryEntry], seed: int
) -> list[Variant]:
    """One expert as it is, under each protection, and each of these after each recovery.

    Raises:
        NotEquivalent, BadInput, UsageError: from a protection.
        CheckpointError: the disk is full or fails.
    """
    torch.set_num_threads(1)  # a worker has one processor, and sums do not depend on how many workers there are
    made = [maker.unprotected()]
    for entry in protections:
        released = maker.protected(entry, seed)
        made += [released, *(maker.recovered(released, recovery) for recovery in recoveries)]
    return made


def _mean(cell: Cell) -> float:
    return sum(float(credited.mean()) for credited in cell.credits.values()) / len(cell.credits)


Models = Mapping[tuple[str, VariantName], Variant]
"""Everything that is merged, by victim and variant."""


@dataclass(frozen=True)
class _Tabulator:
    run: Run
    plan: TablePlan

    def result(self) -> TableResult:
        models = self._models()
        alone = self._alone(models)
        cells = self._cells(models)
        merged = {place: found.cell if isinstance(found, Scored) else found for place, found in cells.items()}
        means = averages(self.plan, merged, alone)
        return TableResult(
            title=self.plan.title,
            source=self.plan.source,
            **self.run.facts(),
            alone=alone,
            averages=tuple(means),
            figures=figures(self.plan, alone, means),
            published=dict(self.plan.published),
            cells=tuple(_cell(place, found) for place, found in cells.items()),
        )

    def _models(self) -> Models:
        calls: list[Call] = []
        for victim in self.plan.victims:
            expert = self.plan.expert(victim)
            task = self.plan.task(expert.task)
            maker = ModelMaker(self.plan.base, expert, task, self.run.models, self.run.digests, silent)
            given = [entry.given(expert) for entry in self.plan.protections]
            calls.append((make_models, (maker, given, self.plan.recoveries, self.plan.seed)))
        made = self.run.done("making models", calls, "experts")
        return {
            (victim, name): variant
            for victim, variants in zip(self.plan.victims, made, strict=True)
            for name, variant in zip(self.plan.variants, variants, strict=True)
        }

    def _cells(self, models: Models) -> dict[Place, Scored | str]:
        """What every place holds; or why there is nothing."""
        places = {
            Place(victim, name, partners, merge.name): self._group(victim, models[victim, name], partners, merge)
            for victim in self.plan.victims
            for name in self.plan.variants
            for partners in self.plan.groups(victim)
            for merge in self.plan.merges
        }
        scored = iter(self._scored("merging", [group for group in places.values() if isinstance(group, Group)]))
        made = [(f"{victim} ({name})", variant) for (victim, name), variant in models.items() if name != VariantName()]
        cells = {place: next(scored) if isinstance(group, Group) else group for place, group in places.items()}
        return {
            place: self.run.without_paths(found, made) if isinstance(found, str) else found
            for place, found in cells.items()
        }

    def _group(self, victim: str, variant: Variant, partners: tuple[str, ...], merge: MergeEntry) -> Group | str:
        """What is to be scored; or why there is no model to merge."""
        if variant.checkpoint is None:
            return variant.refusal
        others = [self.plan.expert(partner) for partner in partners]
        models = (variant.checkpoint, *(self.run.checkpoint(other.path) for other in others))
        tasks = dict.fromkeys([self.plan.expert(victim).task, *(other.task for other in others)])
        return self._grouped(models, merge, tasks)

    def _grouped(self, models: tuple[Checkpoint, ...], merge: MergeEntry | None, tasks: Iterable[str]) -> Group:
        scored = tuple(self.run.scored(self.plan.task(name)) for name in tasks)
        return Group(self.run.checkpoint(self.plan.base), models, merge, scored)

    def _alone(self, models: Models) -> Alone:
        """Models that are not merged. On tasks of no expert each victim, as it is and as it is released."""
        experts = {(expert.name, None): self.run.checkpoint(expert.path) for expert in self.plan.experts}
        released = {
            (victim, name.protection): variant.checkpoint
            for (victim, name), variant in models.items()
            if name.protection and not name.recovery and variant.checkpoint is not None
        }
        own = {expert.name: expert.task for expert in self.plan.experts}
        elsewhere = self.plan.other_tasks
        wanted = [(key, model, [own[key[0]]]) for key, model in (experts | released).items()]
        if elsewhere:
            wanted += [(key, model, list(elsewhere)) for key, model, _ in wanted if key[0] in self.plan.victims]
        groups = [self._grouped((self.run.checkpoint(self.plan.base),), None, [task.name for task in self.plan.tasks])]
        groups += [self._grouped((model,), None, tasks) for _, model, tasks in wanted]
        of_base, *cells = [_scores_alone(scored) for scored in self._scored("scoring models alone", groups)]
        scores: dict[tuple[str, str | None], dict[str, float | None]] = {}
        for (key, _, _), cell in zip(wanted, cells, strict=True):
            scores.setdefault(key, {}).update(cell)

        def protected(task: str | None = None) -> dict[str, dict[str, float | None]]:
            """Scores of releases, by protection and victim, on a task or on the victim's own."""
            return {
                entry.name: {v: scores[v, name][task or own[v]] for v, name in released if name == entry.name}
                for entry in self.plan.protections
            }

        return Alone(
            base=of_base,
            experts={name: scores[name, None][own[name]] for name, _ in experts},
            protected=protected(),
            elsewhere={
                task: ModelScores(
                    experts={victim: scores[victim, None][task] for victim in self.plan.victims},
                    protected=protected(task),
                )
                for task in elsewhere
            }
            or None,
        )

    def _scored(self, stage: str, groups: Sequence[Group]) -> list[Scored | str]:
        return self.run.done(stage, [(score_group, (group, self.run.cells)) for group in groups], "models")


def _cell(place: Place, found: Scored | str) -> TableCell:
    named: dict[str, Any] = {**vars(place), "variant": str(place.variant)}
    if isinstance(found, str):
        return TableCell(**named, refused=found)
    seconds = round(found.cell.cpu_seconds, 3)
    return TableCell(**named, coefficient=found.coefficient, scores=_scores(found.cell), cpu_seconds=seconds)


def _scores_alone(scored: Scored | str) -> dict[str, float | None]:
    if isinstance(scored, str):
        raise BadInput(f"a model cannot be scored alone: {scored}")
    return _scores(scored.cell)


def _scores(cell: Cell) -> dict[str, float | None]:
    return {task: rounded(float(credited.mean())) for task, credited in cell.credits.items()}
