"""The road of a table: check the plan, make the models, merge every group of them, take averages.

Everything computed lies in the table's folder under content-addressed names, so that the same command goes on after
whatever stopped it:

    DIR/models/     protected and recovered checkpoints
    DIR/cells/      scores
    DIR/table.json  the result
    DIR/table.md    the same to read
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import replace_file
from unmergeable.errors import BadInput
from unmergeable.evaluation.cells import Cell
from unmergeable.evaluation.lock import locked
from unmergeable.evaluation.models import ModelMaker, Variant
from unmergeable.evaluation.naming import named
from unmergeable.evaluation.pool import Call, Pool, WorkerPool, run_all
from unmergeable.evaluation.preparation import environment, hashed, prepared, require_fine_tunes
from unmergeable.evaluation.scoring import Checkpoint, ScoredTask, task_digest
from unmergeable.evaluation.table_cells import Group, make_models, score_group
from unmergeable.evaluation.table_file import downloaded, read_table_plan
from unmergeable.evaluation.table_page import page
from unmergeable.evaluation.table_plan import TableMerge, TablePlan, VariantName
from unmergeable.evaluation.table_scores import Place, averages, figures, rounded
from unmergeable.progress import Progress, silent

RESULT, PAGE = "table.json", "table.md"


def table(
    plan: Path, *, out: Path, root: Path | None = None, workers: int | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Score merges of protected experts with fixed settings, as a paper's table does.

    Interrupted or killed, the same call goes on: nothing that was computed is computed again.

    Args:
        plan: a YAML file (:mod:`unmergeable.evaluation.table_file`).
        out: folder of the table; created, or that of an earlier run.
        root: where the relative paths of the plan start; its folder when None.
        workers: processes; None for one per GPU, or per processor where there are no GPUs. The result does not depend
            on it.
        progress: told of models made and groups scored.

    Returns:
        What is written to ``out/table.json``; docs/tables.md explains every entry.

    Raises:
        BadInput, UsageError: the plan, a checkpoint or the data cannot be used; before any compute where possible.
        NotEquivalent: a protection changed the function.
        CheckpointError: the disk is full or fails; what was done is kept.
    """
    parsed = downloaded(read_table_plan(plan.absolute(), None if root is None else root.absolute()))
    require_fine_tunes(parsed.base, parsed.experts)
    with locked(prepared(out, "table")):
        digests = hashed(parsed.paths, progress)
        _require_different(parsed, digests)
        with WorkerPool(workers) as pool:
            document = _Tabulator(parsed, out.resolve(), digests, pool, progress).run()
        replace_file(out / RESULT, (json.dumps(document, indent=1) + "\n").encode())
        replace_file(out / PAGE, page(document).encode())
    return document


def _require_different(plan: TablePlan, digests: Mapping[Path, str]) -> None:
    """Experts that are one checkpoint would be made at the same time, in the same place."""
    names: dict[str, str] = {}
    for expert in plan.experts:
        other = names.setdefault(digests[expert.path], expert.name)
        if other != expert.name:
            raise BadInput(f"experts {other} and {expert.name} are the same checkpoint; leave one of them out.")


@dataclass(frozen=True)
class _Tabulator:
    plan: TablePlan
    folder: Path
    digests: Mapping[Path, str]
    pool: Pool
    progress: Progress

    def run(self) -> dict[str, Any]:
        models = self._models()
        alone = self._alone(models)
        places = {
            Place(victim, name, partners, merge.name): self._group(name, victim, partners, models, merge)
            for victim in self.plan.victims
            for name in self.plan.variants
            for partners in self.plan.groups(victim)
            for merge in self.plan.merges
        }
        groups = [group for group in places.values() if isinstance(group, Group)]
        scored = iter(self._scored("merging", groups))
        cells = {
            place: self._named(next(scored) if isinstance(group, Group) else group, models)
            for place, group in places.items()
        }
        found = averages(self.plan, cells, alone)
        return {
            "title": self.plan.title,
            "source": self.plan.source,
            "plan": self.plan.document,
            "environment": environment(),
            "digests": {path.name: digest for path, digest in self.digests.items()},
            "tasks": {task.name: {"kind": task.kind.name, **task.kind.facts()} for task in self.plan.tasks},
            "alone": alone,
            "averages": found,
            "figures": figures(self.plan, alone, found),
            "published": dict(self.plan.published),
            "cells": [_describe(place, cell) for place, cell in cells.items()],
        }

    def _models(self) -> dict[tuple[str, VariantName], Variant]:
        """Everything that is merged, by victim and variant."""
        calls: list[Call] = []
        for victim in self.plan.victims:
            expert = self.plan.expert(victim)
            task = self.plan.task(expert.task)
            maker = ModelMaker(self.plan.base, expert, task, self.folder / "models", self.digests, silent)
            given = [self.plan.given(entry, victim) for entry in self.plan.protections]
            calls.append((make_models, (maker, given, self.plan.recoveries, self.plan.seed)))
        made = run_all(self.pool, calls, "making models", "experts", self.progress)
        return {
            (victim, name): variant
            for victim, variants in zip(self.plan.victims, made, strict=True)
            for name, variant in zip(self.plan.variants, variants, strict=True)
        }

    def _group(
        self,
        name: VariantName,
        victim: str,
        partners: tuple[str, ...],
        models: Mapping[tuple[str, VariantName], Variant],
        merge: TableMerge,
    ) -> Group | str:
        """What is to be scored; or why there is no model to merge."""
        variant = models[victim, name]
        if variant.checkpoint is None:
            return variant.refusal
        others = [self.plan.expert(partner) for partner in partners]
        tasks = dict.fromkeys([self.plan.expert(victim).task, *(other.task for other in others)])
        checkpoints = (variant.checkpoint, *(self._checkpoint(other.path) for other in others))
        return Group(self._checkpoint(self.plan.base), checkpoints, merge, self._tasks(tasks))

    def _alone(self, models: Mapping[tuple[str, VariantName], Variant]) -> dict[str, Any]:
        """Scores of models that are not merged: the base on every task, all others on their own.

        On tasks of no expert what a protection costs elsewhere: each victim, as it is and as it is released.
        """
        base = self._checkpoint(self.plan.base)
        experts = {expert.name: self._checkpoint(expert.path) for expert in self.plan.experts}
        released: dict[tuple[str, str], Checkpoint] = {}
        for (victim, name), variant in models.items():
            if name.protection and not name.recovery:
                assert variant.checkpoint is not None
                released[victim, name.protection] = variant.checkpoint
        owners = [*experts, *(victim for victim, _ in released)]
        groups = [self._single(base, [task.name for task in self.plan.tasks])]
        for owner, checkpoint in zip(owners, [*experts.values(), *released.values()], strict=True):
            groups.append(self._single(checkpoint, [self.plan.expert(owner).task]))
        elsewhere = self.plan.other_tasks
        if elsewhere:
            victims = [experts[victim] for victim in self.plan.victims]
            groups += [self._single(checkpoint, elsewhere) for checkpoint in (*victims, *released.values())]
        cells = []
        for cell in self._scored("scoring models alone", groups):
            if not isinstance(cell, Cell):
                raise BadInput(f"a model cannot be scored alone: {cell}")
            cells.append(_scores(cell))
        of_base, own, others = cells[0], cells[1 : len(owners) + 1], cells[len(owners) + 1 :]
        scores = [next(iter(found.values())) for found in own]
        document = {
            "base": of_base,
            "experts": dict(zip(experts, scores[: len(experts)], strict=True)),
            "protected": self._by_protection(dict(zip(released, scores[len(experts) :], strict=True))),
        }
        if elsewhere:
            plain, protected = others[: len(self.plan.victims)], others[len(self.plan.victims) :]
            document["elsewhere"] = {
                task: {
                    "experts": {v: found[task] for v, found in zip(self.plan.victims, plain, strict=True)},
                    "protected": self._by_protection(
                        {key: found[task] for key, found in zip(released, protected, strict=True)}
                    ),
                }
                for task in elsewhere
            }
        return document

    def _single(self, checkpoint: Checkpoint, tasks: Sequence[str]) -> Group:
        """A model that is not merged."""
        return Group(self._checkpoint(self.plan.base), (checkpoint,), None, self._tasks(tasks))

    def _by_protection(self, scores: Mapping[tuple[str, str], float | None]) -> dict[str, dict[str, float | None]]:
        """Scores of releases, by protection and victim."""
        return {
            entry.name: {victim: score for (victim, name), score in scores.items() if name == entry.name}
            for entry in self.plan.protections
        }

    def _named(self, found: Cell | str, models: Mapping[tuple[str, VariantName], Variant]) -> Cell | str:
        """A refusal that names models by what they are: where they lie is no part of the result."""
        if isinstance(found, Cell):
            return found
        names = {
            str(variant.checkpoint.path): f"{victim} ({name})"
            for (victim, name), variant in models.items()
            if variant.checkpoint is not None
        }
        names |= {str(expert.path): expert.name for expert in self.plan.experts}
        names[str(self.plan.base)] = "the base"
        return named(found, names)

    def _scored(self, stage: str, groups: Sequence[Group]) -> list[Any]:
        calls: list[Call] = [(score_group, (group, self.folder / "cells")) for group in groups]
        return run_all(self.pool, calls, stage, "models", self.progress)

    def _checkpoint(self, path: Path) -> Checkpoint:
        return Checkpoint(path, self.digests[path])

    def _tasks(self, names: Iterable[str]) -> tuple[ScoredTask, ...]:
        entries = [self.plan.task(name) for name in names]
        return tuple(ScoredTask(entry, {"test": task_digest(entry, self.digests, "test")}) for entry in entries)


def _describe(place: Place, cell: Cell | str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "victim": place.victim,
        "variant": str(place.variant),
        "partners": list(place.partners),
        "merge": place.merge,
    }
    if not isinstance(cell, Cell):
        return {**found, "refused": cell}
    return {**found, "scores": _scores(cell), "cpu_seconds": round(cell.cpu_seconds, 3)}


def _scores(cell: Cell) -> dict[str, float | None]:
    """Shares of right answers by task."""
    return {task: rounded(float(found.mean())) for task, found in cell.credits.items()}
