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

from unmergeable.api.data_merges import DATA_DRIVEN
from unmergeable.api.steps import steps_of
from unmergeable.auditing.analysis_settings import read_analysis_settings
from unmergeable.auditing.fields import Entry, require_unique
from unmergeable.auditing.plan import (
    DEFENDED_COEFFICIENTS,
    REFINEMENTS,
    RIDER_COEFFICIENTS,
    TEST,
    VALIDATION,
    Coefficients,
    ExpertEntry,
    FewShotEntry,
    MethodEntry,
    Plan,
    ProtectionEntry,
    RecoveryEntry,
    TaskEntry,
    Tier,
    joined,
)
from unmergeable.checkpoint.hub import download, is_on_hub
from unmergeable.data import download_data
from unmergeable.errors import BadInput
from unmergeable.merges import MERGES, AdaMerging
from unmergeable.recoveries import RECOVERIES
from unmergeable.settings import configure, nearest
from unmergeable.tasks import TASKS, Classification, Generation, MultipleChoice, Perplexity, TaskKind

LEARNABLE = (Classification.name, MultipleChoice.name, Generation.name, Perplexity.name)
"""Kinds of task that an attacker can train on."""

FEWEST_SAMPLES = 2

NOT_BEFORE_MERGING = {
    "few_shot": "is what an attacker of tier T2 does after merging; see few_shot in docs/audit.md.",
    "grad_erase": "works on merges; an attacker of tier T2 trains them with few_shot.",
    "unmask": "works on merges, where another coefficient of task_arithmetic does the same.",
}
"""Recoveries of merges, and why they are none of a release."""

TIERS_WITHOUT_DATA: tuple[Tier, ...] = ("T0", "T1")
"""Those of a plan that names none."""

_TOP = (
    "base", "experts", "protect", "merges", "recoveries", "coefficients", "tiers", "few_shot", "tasks", "seeds",
    "analyses",
)  # fmt: skip


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
        protections=protect.listed("methods", partial(_protection, folder=folder)),
        merges=top.listed("merges", _merge),
        recoveries=top.listed("recoveries", partial(_recovery, folder=folder), default=()),
        coefficients=Coefficients(
            grid.numbers("defended", DEFENDED_COEFFICIENTS),
            grid.numbers("rider", RIDER_COEFFICIENTS),
            grid.whole("refinements", REFINEMENTS, least=0),
        ),
        tiers=_tiers(top),
        few_shot=_few_shot(top),
        tasks=top.listed("tasks", partial(_task, folder=folder, base=base)),
        seeds=tuple(_seeds(top)),
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

    def local(path: Path) -> Path:
        return download(str(path)) if is_on_hub(str(path)) else path

    def local_data(path: Path) -> Path:
        return download_data(str(path)) if is_on_hub(str(path)) else path

    return replace(
        plan,
        base=local(plan.base),
        experts=tuple(replace(expert, path=local(expert.path)) for expert in plan.experts),
        protections=tuple(
            replace(
                entry,
                encoder=entry.encoder and local(entry.encoder),
                siblings=tuple(local(path) for path in entry.siblings),
            )
            for entry in plan.protections
        ),
        recoveries=tuple(
            replace(entry, sources=tuple(local(path) for path in entry.sources)) for entry in plan.recoveries
        ),
        tasks=tuple(
            replace(
                task,
                encoder=local(task.encoder),
                train=task.train and local_data(task.train),
                validation=local_data(task.validation),
                test=local_data(task.test),
            )
            for task in plan.tasks
        ),
    )


def _expert(item: object, where: str, folder: Path) -> ExpertEntry:
    entry = Entry(item, ("name", "path", "task"), where)
    return ExpertEntry(entry.text("name"), entry.checkpoint("path", folder), entry.text("task"))


def _protection(item: object, where: str, folder: Path) -> ProtectionEntry:
    if isinstance(item, str):
        found = ProtectionEntry(item, item, {})
    else:
        entry = Entry(item, ("name", "method", "settings", "data", "head", "encoder", "siblings"), where)
        found = ProtectionEntry(
            name=entry.text("name", entry.text("method")),
            method=entry.text("method"),
            settings=entry.mapping("settings"),
            data=entry.path("data", folder) if "data" in entry else None,
            head=entry.path("head", folder) if "head" in entry else None,
            encoder=entry.checkpoint("encoder", folder) if "encoder" in entry else None,
            siblings=entry.checkpoints("siblings", folder),
        )
    reads = frozenset[str]().union(*(step.reads for step in steps_of(found.method, found.settings)))
    given = {"data": found.data, "head": found.head, "encoder": found.encoder, "siblings": found.siblings}
    for what, value in given.items():
        if value and what not in reads:
            raise BadInput(f"{where}: {found.method} with these settings reads no {what}; leave it out.")
        if not value and what in reads and what in ("data", "siblings"):
            raise BadInput(f"{where}: {found.method} reads {what}; give {what}.")
    return found


def _merge(item: object, where: str) -> MethodEntry:
    found = _known(_named(item, where), where, MERGES, "merge")
    if found.method in DATA_DRIVEN and found.method != AdaMerging.name:
        raise BadInput(f"{where}: {found.method} needs data, which no attacker here merges with; adamerging can.")
    return found


def _recovery(item: object, where: str, folder: Path) -> RecoveryEntry:
    """A name, several with commas between them, a method with settings, or a list of steps."""
    if isinstance(item, str):
        return _checked(RecoveryEntry(item, tuple(_step(part.strip(), where) for part in item.split(","))), where)
    entry = Entry(item, ("name", "method", "settings", "steps", "sources"), where)
    if ("method" in entry) == ("steps" in entry):
        raise BadInput(f"{where}: give either a method or steps, a list of methods.")
    if "steps" in entry:
        steps = entry.listed("steps", _step)
    else:
        steps = (_step({"method": entry.text("method"), "settings": entry.mapping("settings")}, where),)
    name = entry.text("name", joined([{"method": step.method} for step in steps]))
    return _checked(RecoveryEntry(name, steps, entry.checkpoints("sources", folder)), where)


def _step(item: object, where: str) -> MethodEntry:
    return _known(_named(item, where), where, RECOVERIES, "recovery")


def _checked(found: RecoveryEntry, where: str) -> RecoveryEntry:
    for step in found.steps:
        if step.method in NOT_BEFORE_MERGING:
            raise BadInput(f"{where}: {step.method} {NOT_BEFORE_MERGING[step.method]}")
    wanted = [step.method for step in found.steps if "sources" in RECOVERIES[step.method].needs]
    if wanted and not found.sources:
        raise BadInput(f"{where}: {wanted[0]} needs sources, public fine-tunes of the base; list some.")
    if found.sources and not wanted:
        raise BadInput(f"{where}: none of its methods reads sources; leave them out.")
    return found


def _known(found: MethodEntry, where: str, registry: Mapping[str, type], kind: str) -> MethodEntry:
    if found.method not in registry:
        raise BadInput(f"{where}: no {kind} is called {found.method!r}{nearest(found.method, registry)}")
    configure(registry[found.method], found.settings)
    return found


def _named(item: object, where: str) -> MethodEntry:
    if isinstance(item, str):
        return MethodEntry(item, item, {})
    entry = Entry(item, ("name", "method", "settings"), where)
    method = entry.text("method")
    return MethodEntry(entry.text("name", method), method, entry.mapping("settings"))


def _task(item: object, where: str, folder: Path, base: Path) -> TaskEntry:
    known = (
        "name",
        "kind",
        "settings",
        "data",
        "train",
        "validation",
        "test",
        "head",
        "encoder",
        "examples",
        "batch_size",
    )
    entry = Entry(item, known, where)
    if ("data" in entry) == ("validation" in entry or "test" in entry or "train" in entry):
        raise BadInput(f"{where}: give either data, which is split, or validation and test (and train).")
    train, validation, test = ("data",) * 3 if "data" in entry else ("train", "validation", "test")
    sizes = Entry(entry.document("examples", {}), ("validation", "test"), f"{where}, examples")
    return TaskEntry(
        name=entry.text("name"),
        train=entry.checkpoint(train, folder) if train in entry else None,
        validation=entry.checkpoint(validation, folder),
        test=entry.checkpoint(test, folder),
        head=entry.path("head", folder) if "head" in entry else None,
        encoder=entry.checkpoint("encoder", folder) if "encoder" in entry else base,
        sizes=(sizes.whole("validation", VALIDATION), sizes.whole("test", TEST)),
        batch_size=entry.whole("batch_size", 64),
        kind=_kind(entry, folder),
    )


def _kind(entry: Entry, folder: Path) -> TaskKind:
    """The kind of a task with its settings; paths among them are relative to ``folder``."""
    name = entry.text("kind", Classification.name)
    if name not in TASKS:
        raise BadInput(f"{entry.where}: no kind of task is called {name!r}{nearest(name, TASKS)}")
    if name != Classification.name and "head" in entry:
        raise BadInput(f"{entry.where}: {name} has no use for a head; leave it out.")
    settings = dict(entry.mapping("settings"))
    paths = Entry({key: settings[key] for key in TASKS[name].paths if key in settings}, TASKS[name].paths, entry.where)
    return configure(
        TASKS[name], settings | {key: str(paths.path(key, folder)) for key in TASKS[name].paths if key in paths}
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
