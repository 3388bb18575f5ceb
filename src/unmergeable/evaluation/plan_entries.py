"""The entries of a plan that audits and tables share: experts, protections, merges, recoveries, tasks.

Each function reads one item of a list; ``where`` names it in messages, ``folder`` is where its paths start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unmergeable.attacks import ATTACKS
from unmergeable.errors import BadInput
from unmergeable.evaluation.fields import Entry
from unmergeable.evaluation.plan import (
    TEST,
    VALIDATION,
    ExpertEntry,
    MethodEntry,
    ProtectionEntry,
    RecoveryEntry,
    TaskEntry,
    joined,
)
from unmergeable.merges import MERGES, AdaMerging
from unmergeable.settings import configure, nearest
from unmergeable.tasks import TASKS, Classification, TaskKind

NOT_BEFORE_MERGING = {
    "few_shot": "is what an attacker of tier T2 does after merging; see few_shot in docs/audit.md.",
    "grad_erase": "works on merges; an attacker of tier T2 trains them with few_shot.",
    "unmask": "works on merges, where another coefficient of task_arithmetic does the same.",
}
"""Recoveries of merges, and why they are none of a release."""


def read_expert(item: object, where: str, folder: Path) -> ExpertEntry:
    """A fine-tune and its task."""
    entry = Entry(item, ("name", "path", "task"), where)
    return ExpertEntry(entry.text("name"), entry.checkpoint("path", folder), entry.text("task"))


def read_protection(item: object, where: str, folder: Path) -> ProtectionEntry:
    """A name, or a method with settings and what it reads of the owner's."""
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
    require_reads(found, where)
    return found


def require_reads(entry: ProtectionEntry, where: str) -> None:
    """Raises BadInput unless a protection is given what it reads, and nothing else."""
    given = {"data": entry.data, "head": entry.head, "encoder": entry.encoder, "siblings": entry.siblings}
    for what, value in given.items():
        if value and what not in entry.reads:
            raise BadInput(f"{where}: {entry.method} with these settings reads no {what}; leave it out.")
        if not value and what in entry.reads and what in ("data", "siblings"):
            raise BadInput(f"{where}: {entry.method} reads {what}; give {what}.")


def read_merge(item: object, where: str) -> MethodEntry:
    """A name, or a method with settings."""
    found = known_merge(_named(item, where), where)
    if MERGES[found.method]().needs_data and found.method != AdaMerging.name:
        raise BadInput(f"{where}: {found.method} needs data, which no attacker here merges with; adamerging can.")
    return found


def known_merge(found: MethodEntry, where: str) -> MethodEntry:
    """A merge that exists, with settings that it has."""
    return _known(found, where, MERGES, "merge")


def read_recovery(item: object, where: str, folder: Path) -> RecoveryEntry:
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
    return _known(_named(item, where), where, ATTACKS, "recovery")


def _checked(found: RecoveryEntry, where: str) -> RecoveryEntry:
    for step in found.steps:
        if step.method in NOT_BEFORE_MERGING:
            raise BadInput(f"{where}: {step.method} {NOT_BEFORE_MERGING[step.method]}")
    wanted = [step.method for step in found.steps if "sources" in ATTACKS[step.method]().requirements().needs]
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


_OF_A_TASK = (
    "name", "kind", "settings", "data", "train", "validation", "test", "head", "encoder", "examples", "batch_size",
)  # fmt: skip


def read_task(item: object, where: str, folder: Path, base: Path, *, selects: bool = True) -> TaskEntry:
    """What is scored; ``selects``: whether validation examples are needed, for an attacker to select on."""
    entry = Entry(item, _OF_A_TASK, where)
    if ("data" in entry) == ("validation" in entry or "test" in entry or "train" in entry):
        parts = "validation and test (and train)" if selects else "test"
        raise BadInput(f"{where}: give either data, which is split, or {parts}.")
    train, validation, test = ("data",) * 3 if "data" in entry else ("train", "validation", "test")
    sizes = Entry(entry.document("examples", {}), ("validation", "test"), f"{where}, examples")
    return TaskEntry(
        name=entry.text("name"),
        train=entry.checkpoint(train, folder) if train in entry else None,
        validation=entry.checkpoint(validation, folder) if selects or validation in entry else None,
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
