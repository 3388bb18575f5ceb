"""The plan of an audit: which expert is defended, by what, against which attacks, scored on what.

    base: base
    experts:
      - {name: digits, path: expert-digits, task: digits}
      - {name: animals, path: expert-animals, task: animals}
    protect:
      expert: digits
      methods: [mergelock, {name: strong, method: mergelock, settings: {condition: 1000}}]
    merges: [task_arithmetic, ties]
    recoveries: [kabsch, nearest_orbit]
    tasks:
      - {name: digits, data: digits.npz, head: digits-head.safetensors}
      - {name: animals, data: animals.npz, head: animals-head.safetensors}

Every other expert is a free-rider's, of whom each is an attack of its own. Paths are relative to the plan; a
checkpoint may be ``hub:OWNER/NAME`` too. Everything that can be wrong with a plan is found before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from unmergeable.errors import BadInput
from unmergeable.evaluation.analysis_settings import read_analysis_settings
from unmergeable.evaluation.downloads import local_checkpoint, recovery_downloaded, task_downloaded
from unmergeable.evaluation.fields import Entry, read_document, require_unique
from unmergeable.evaluation.plan import (
    CONNECTIVITY,
    DEFENDED_COEFFICIENTS,
    REFINEMENTS,
    RIDER_COEFFICIENTS,
    Coefficients,
    FewShotEntry,
    Plan,
    Tier,
)
from unmergeable.evaluation.plan_entries import read_expert, read_merge, read_protection, read_recovery, read_task
from unmergeable.settings import nearest
from unmergeable.tasks import Classification, Generation, MultipleChoice, Perplexity

LEARNABLE = (Classification.name, MultipleChoice.name, Generation.name, Perplexity.name)
"""Kinds of task that an attacker can train on."""

FEWEST_SAMPLES = 2

TIERS_WITHOUT_DATA: tuple[Tier, ...] = ("T0", "T1")
"""Those of a plan that names none."""

_TOP = (
    "base", "experts", "protect", "merges", "recoveries", "coefficients", "tiers", "few_shot", "tasks", "seeds",
    "connectivity", "analyses",
)  # fmt: skip


def read_plan(path: Path) -> Plan:
    """A plan from its YAML file.

    Raises:
        BadInput: the file cannot be read; an entry is missing, misspelt or means nothing; a path leads nowhere; two
            things have one name. One line, before any compute.
        UsageError: a setting that its method does not have.
    """
    return parse_plan(read_document(path, "docs/audit.md"), path.parent, str(path))


def parse_plan(document: object, folder: Path, where: str = "the plan") -> Plan:
    """A plan from its parsed document; ``folder`` is where its paths start. Raises what :func:`read_plan` does."""
    top = Entry(document, _TOP, where)
    base = top.checkpoint("base", folder)
    protect = Entry(top.document("protect"), ("expert", "methods"), f"{where}, protect")
    grid = Entry(top.document("coefficients", {}), ("defended", "rider", "refinements"), f"{where}, coefficients")
    plan = Plan(
        base=base,
        experts=top.listed("experts", partial(read_expert, folder=folder)),
        defended=protect.text("expert"),
        protections=protect.listed("methods", partial(read_protection, folder=folder)),
        merges=top.listed("merges", read_merge),
        recoveries=top.listed("recoveries", partial(read_recovery, folder=folder), default=()),
        coefficients=Coefficients(
            grid.numbers("defended", DEFENDED_COEFFICIENTS),
            grid.numbers("rider", RIDER_COEFFICIENTS),
            grid.whole("refinements", REFINEMENTS, least=0),
        ),
        tiers=_tiers(top),
        few_shot=_few_shot(top),
        tasks=top.listed("tasks", partial(read_task, folder=folder, base=base)),
        seeds=tuple(_seeds(top)),
        connectivity=_connectivity(top),
        analyses=read_analysis_settings(top.document("analyses"), f"{where}, analyses"),
        document=dict(document) if isinstance(document, Mapping) else {},
    )
    _require_consistent(plan, where)
    return plan


def downloaded(plan: Plan) -> Plan:
    """The plan with the checkpoints and the data of tasks that it names on the hub as local folders.

    Raises:
        UsageError, BadInput: as :func:`unmergeable.checkpoint.hub.download` and
            :func:`unmergeable.data.download_data` do.
    """
    return replace(
        plan,
        base=local_checkpoint(plan.base),
        experts=tuple(replace(expert, path=local_checkpoint(expert.path)) for expert in plan.experts),
        protections=tuple(
            replace(
                entry,
                encoder=entry.encoder and local_checkpoint(entry.encoder),
                siblings=tuple(local_checkpoint(path) for path in entry.siblings),
            )
            for entry in plan.protections
        ),
        recoveries=tuple(recovery_downloaded(entry) for entry in plan.recoveries),
        tasks=tuple(task_downloaded(task) for task in plan.tasks),
    )


def _tiers(top: Entry) -> tuple[Tier, ...]:
    known = get_args(Tier)
    named = top.texts("tiers", TIERS_WITHOUT_DATA)
    for name in named:
        if name not in known:
            raise BadInput(f"{top.where}, tiers: {name!r} is not known; known: {', '.join(known)}.")
    if not named:
        raise BadInput(f"{top.where}, tiers: none is left; known: {', '.join(known)}.")
    return tuple(tier for tier in known if tier in named)


def _few_shot(top: Entry) -> FewShotEntry:
    default = FewShotEntry()
    entry = Entry(top.document("few_shot", {}), ("samples", "starts", "settings"), f"{top.where}, few_shot")
    samples = entry.numbers("samples", default.samples)
    if not all(number.is_integer() and number >= FEWEST_SAMPLES for number in samples):
        raise entry.wrong("samples", f"must be whole numbers of at least {FEWEST_SAMPLES}", list(samples))
    settings = entry.mapping("settings")
    if "samples" in settings:
        raise BadInput(f"{entry.where}, settings: samples stands beside settings, as a list.")
    found = FewShotEntry(tuple(map(int, samples)), entry.whole("starts", default.starts), settings)
    found.methods(FEWEST_SAMPLES)
    return found


def _connectivity(top: Entry) -> int:
    """Points of a line; a line has two ends and something between them."""
    points = top.whole("connectivity", CONNECTIVITY, least=0)
    if points in (1, 2):
        raise top.wrong("connectivity", "must be at least 3, or 0 to leave it out", points)
    return points


def _seeds(top: Entry) -> list[int]:
    seeds = top.document("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise top.wrong("seeds", "must be a list of whole numbers", seeds)
    return seeds


def _require_consistent(plan: Plan, where: str) -> None:
    require_unique([expert.name for expert in plan.experts], f"{where}, experts")
    require_unique([task.name for task in plan.tasks], f"{where}, tasks")
    require_unique([method.name for method in plan.protections], f"{where}, protect, methods")
    require_unique([merge.name for merge in plan.merges], f"{where}, merges")
    require_unique([recovery.name for recovery in plan.recoveries], f"{where}, recoveries")
    require_unique([str(seed) for seed in plan.seeds], f"{where}, seeds")
    names = {expert.name: None for expert in plan.experts}
    if plan.defended not in names:
        raise BadInput(f"{where}, protect: no expert is called {plan.defended!r}{nearest(plan.defended, names)}")
    if not plan.riders:
        raise BadInput(f"{where}, experts: nobody to merge with; add a free-rider's expert.")
    tasks = {task.name: None for task in plan.tasks}
    for expert in plan.experts:
        if expert.task not in tasks:
            raise BadInput(
                f"{where}, expert {expert.name}: no task is called {expert.task!r}{nearest(expert.task, tasks)}"
            )
    for rider in plan.riders:
        if rider.task == plan.victim.task:
            raise BadInput(f"{where}, expert {rider.name}: it has the defended task; a free-rider lacks that skill.")
    for task in plan.tasks:
        if plan.reaches("T2") and task.kind.name not in LEARNABLE:
            raise BadInput(
                f"{where}, task {task.name}: tiers T2 and T3 learn from {', '.join(LEARNABLE)}, not from "
                f"{task.kind.name}; leave them out."
            )
        if plan.reaches("T2") and task.train is None:
            raise BadInput(f"{where}, task {task.name}: tiers T2 and T3 learn from examples; give train.")
        if task.train in (task.validation, task.test) and not task.is_split:
            raise BadInput(f"{where}, task {task.name}: train must be other data than validation and test.")
    for recovery in plan.recoveries:
        if recovery.tier == "T3" and not plan.reaches("T3"):
            raise BadInput(f"{where}, recovery {recovery.name}: it needs data, which tier T3 has; add it to tiers.")
        if recovery.tier == "T3" and plan.task(plan.victim.task).is_split:
            raise BadInput(
                f"{where}, task {plan.victim.task}: recovery {recovery.name} reads examples; give them as train, a "
                "file of their own."
            )
    for merge in plan.merges:
        if not plan.reaches(merge.tier):
            raise BadInput(f"{where}, merge {merge.name}: it needs data, which tier T3 has; add it to tiers.")
    if 1.0 not in plan.coefficients.defended:
        raise BadInput(f"{where}, coefficients: defended must contain 1.0, or the expert is never used as it was made.")
