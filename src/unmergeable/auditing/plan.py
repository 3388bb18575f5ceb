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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from unmergeable.api.data_merges import DATA_DRIVEN
from unmergeable.api.recipe import configure_protections
from unmergeable.auditing.fields import Entry, require_unique
from unmergeable.checkpoint.hub import download, is_on_hub
from unmergeable.errors import BadInput
from unmergeable.merges import MERGES
from unmergeable.recoveries import RECOVERIES
from unmergeable.settings import configure, nearest

Tier = Literal["T0", "T1"]
"""What the attacker knows. T0: nothing, it merges with ordinary tools. T1: the base and the method; it has no data."""

DEFENDED_COEFFICIENTS = (0.2, 0.5, 1.0, 1.5)
RIDER_COEFFICIENTS = (0.0, 0.5, 1.0, 1.5)
REFINEMENTS = 8
VALIDATION, TEST = 200, 500

_TOP = (
    "base", "experts", "protect", "merges", "recoveries", "coefficients", "tiers", "tasks", "seeds",
)  # fmt: skip


@dataclass(frozen=True)
class ExpertEntry:
    """A fine-tune of the base, and the task it was tuned for."""

    name: str
    path: Path
    task: str


@dataclass(frozen=True)
class MethodEntry:
    """A protection (or several, separated by commas), merge or recovery with settings, under a name of its own."""

    name: str
    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class TaskEntry:
    """What is scored.

    Attributes:
        validation: data the attacker selects on.
        test: data the result is scored on; may be the same path, whose examples are then split by their content.
        head: turns features into classes (:mod:`unmergeable.tasks.heads`); None for a network that has its own.
        encoder: the folder whose tokenizer or image processor prepares the examples.
        sizes: the most examples of validation and test.
    """

    name: str
    validation: Path
    test: Path
    head: Path | None
    encoder: Path
    sizes: tuple[int, int]
    batch_size: int


@dataclass(frozen=True)
class Coefficients:
    """The coarse grid of the defended expert's and the free-rider's coefficient, and how many points refine it."""

    defended: tuple[float, ...] = DEFENDED_COEFFICIENTS
    rider: tuple[float, ...] = RIDER_COEFFICIENTS
    refinements: int = REFINEMENTS


@dataclass(frozen=True)
class Plan:
    """An audit, checked. ``document`` is the plan as it was written."""

    base: Path
    experts: tuple[ExpertEntry, ...]
    defended: str
    protections: tuple[MethodEntry, ...]
    merges: tuple[MethodEntry, ...]
    recoveries: tuple[MethodEntry, ...]
    coefficients: Coefficients
    tiers: tuple[Tier, ...]
    tasks: tuple[TaskEntry, ...]
    seeds: tuple[int, ...]
    document: Mapping[str, Any]

    @property
    def victim(self) -> ExpertEntry:
        """The expert that is defended."""
        return next(expert for expert in self.experts if expert.name == self.defended)

    @property
    def riders(self) -> tuple[ExpertEntry, ...]:
        """The experts of free-riders."""
        return tuple(expert for expert in self.experts if expert.name != self.defended)

    def task(self, name: str) -> TaskEntry:
        """The task of this name, which must exist."""
        return next(task for task in self.tasks if task.name == name)


def read_plan(path: Path) -> Plan:
    """A plan from its YAML file.

    Raises:
        BadInput: the file cannot be read; an entry is missing, misspelt or means nothing; a path leads nowhere; two
            things have one name. One line, before any compute.
        UsageError: a setting that its method does not have.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); give a plan in YAML.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path} is not YAML ({reason}); see docs/audit.md for a plan.") from None
    return parse_plan(document, path.parent, str(path))


def parse_plan(document: object, folder: Path, where: str = "the plan") -> Plan:
    """A plan from its parsed document; ``folder`` is where its paths start. Raises what :func:`read_plan` does."""
    top = Entry(document, _TOP, where)
    base = top.checkpoint("base", folder)
    protect = Entry(top.document("protect"), ("expert", "methods"), f"{where}, protect")
    grid = Entry(top.document("coefficients", {}), ("defended", "rider", "refinements"), f"{where}, coefficients")
    plan = Plan(
        base=base,
        experts=top.listed("experts", partial(_expert, folder=folder)),
        defended=protect.text("expert"),
        protections=protect.listed("methods", _protection),
        merges=top.listed("merges", partial(_method, registry=MERGES, kind="merge")),
        recoveries=top.listed("recoveries", partial(_method, registry=RECOVERIES, kind="recovery"), default=()),
        coefficients=Coefficients(
            grid.numbers("defended", DEFENDED_COEFFICIENTS),
            grid.numbers("rider", RIDER_COEFFICIENTS),
            grid.whole("refinements", REFINEMENTS, least=0),
        ),
        tiers=_tiers(top),
        tasks=top.listed("tasks", partial(_task, folder=folder, base=base)),
        seeds=tuple(_seeds(top)),
        document=dict(document) if isinstance(document, Mapping) else {},
    )
    _require_consistent(plan, where)
    return plan


def downloaded(plan: Plan) -> Plan:
    """The plan with the checkpoints that it names on the hub as local folders.

    Raises:
        UsageError, BadInput: as :func:`unmergeable.checkpoint.hub.download` does.
    """

    def local(path: Path) -> Path:
        return download(str(path)) if is_on_hub(str(path)) else path

    return replace(
        plan,
        base=local(plan.base),
        experts=tuple(replace(expert, path=local(expert.path)) for expert in plan.experts),
        tasks=tuple(replace(task, encoder=local(task.encoder)) for task in plan.tasks),
    )


def _expert(item: object, where: str, folder: Path) -> ExpertEntry:
    entry = Entry(item, ("name", "path", "task"), where)
    return ExpertEntry(entry.text("name"), entry.checkpoint("path", folder), entry.text("task"))


def _protection(item: object, where: str) -> MethodEntry:
    found = _named(item, where)
    configure_protections(found.method, found.settings)
    return found


def _method(item: object, where: str, registry: Mapping[str, type], kind: str) -> MethodEntry:
    found = _named(item, where)
    if found.method not in registry:
        raise BadInput(f"{where}: no {kind} is called {found.method!r}{nearest(found.method, registry)}")
    needs = ["data"] if found.method in DATA_DRIVEN else getattr(registry[found.method], "needs", ())
    if beyond := [need for need in needs if need != "base"]:
        raise BadInput(f"{where}: {found.method} needs {' and '.join(beyond)}, which no tier here gives the attacker.")
    configure(registry[found.method], found.settings)
    return found


def _named(item: object, where: str) -> MethodEntry:
    if isinstance(item, str):
        return MethodEntry(item, item, {})
    entry = Entry(item, ("name", "method", "settings"), where)
    method = entry.text("method")
    return MethodEntry(entry.text("name", method), method, entry.mapping("settings"))


def _task(item: object, where: str, folder: Path, base: Path) -> TaskEntry:
    entry = Entry(item, ("name", "data", "validation", "test", "head", "encoder", "examples", "batch_size"), where)
    if ("data" in entry) == ("validation" in entry or "test" in entry):
        raise BadInput(f"{where}: give either data, which is split, or validation and test.")
    validation, test = ("data", "data") if "data" in entry else ("validation", "test")
    sizes = Entry(entry.document("examples", {}), ("validation", "test"), f"{where}, examples")
    return TaskEntry(
        name=entry.text("name"),
        validation=entry.path(validation, folder),
        test=entry.path(test, folder),
        head=entry.path("head", folder) if "head" in entry else None,
        encoder=entry.checkpoint("encoder", folder) if "encoder" in entry else base,
        sizes=(sizes.whole("validation", VALIDATION), sizes.whole("test", TEST)),
        batch_size=entry.whole("batch_size", 64),
    )


def _tiers(top: Entry) -> tuple[Tier, ...]:
    known = get_args(Tier)
    named = top.texts("tiers", known)
    for name in named:
        if name not in known:
            raise BadInput(f"{top.where}, tiers: {name!r} is not known; known: {', '.join(known)}.")
    return tuple(tier for tier in known if tier in named)


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
    if 1.0 not in plan.coefficients.defended:
        raise BadInput(f"{where}, coefficients: defended must contain 1.0, or the expert is never used as it was made.")
