"""The entries of a plan that audits and tables share: experts, protections, merges, recoveries, tasks.

Each ``read_…`` reads one item of a list of the plan; ``where`` names it in messages, and relative paths start in
``folder``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmergeable.attacks import ATTACKS, AttackRequirements, Whose
from unmergeable.data import Part
from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation.methods import (
    ON_MERGES,
    attack_requirements,
    merge_learns,
    merge_of,
    protection_reads,
    require_siblings,
)
from unmergeable.evaluation.plans.fields import Entry, require_named
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.merges import MERGES, AdaMerging
from unmergeable.ops.steps import effective_settings, steps_of
from unmergeable.settings import configure
from unmergeable.tasks import TASKS, Classification, TaskKind

VALIDATION, TEST = 200, 500
"""The most examples of these parts, where the plan gives no number."""

OWNED = ("data", "head", "encoder", "generic", "siblings")
"""What a protection may read of the owner's."""


@dataclass(frozen=True)
class ExpertEntry:
    """A fine-tune of the base, the task it was tuned for, and what a protection of it may read of its owner's."""

    name: str
    path: Path
    task: str
    data: Path | None = None
    head: Path | None = None
    siblings: tuple[Path, ...] = ()


@dataclass(frozen=True)
class MethodEntry:
    """A method with settings, under a name of its own."""

    name: str
    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class MergeEntry(MethodEntry):
    """A merge.

    Attributes:
        coefficients: of tables, one for all experts in the merge: the method's own where there is none; where there are
            several, the one that does best on validation examples is taken.
        then: an attack on the merge; None for none.
        start: of audits, where a search begins that gives each part of the defended expert a coefficient of its own
            (:mod:`unmergeable.evaluation.by_part`); empty for one of whole experts.
    """

    coefficients: tuple[float, ...] = ()
    then: MethodEntry | None = None
    start: tuple[float, ...] = ()

    @property
    def threat_model(self) -> ThreatModel:
        """That of the weakest attacker who can do it."""
        return ThreatModel.UNLABELLED if merge_learns(self.method) else ThreatModel.OFF_THE_SHELF

    def require_experts(self, count: int, where: str) -> None:
        """Raises BadInput unless it takes as many experts, and its coefficients."""
        method = merge_of(self.method, self.settings)
        most = method.most_experts or count
        if not method.fewest_experts <= count <= most:
            raise BadInput(f"{where}, merge {self.name}: {self.method} takes {most} experts, not {count}.")
        try:
            for coefficient in self.coefficients or (None,):
                method.resolve([coefficient] * count)
        except UsageError as error:
            raise BadInput(f"{where}, merge {self.name}: {error}") from None


@dataclass(frozen=True)
class ProtectionEntry(MethodEntry):
    """A protection (or several, separated by commas) with what it reads of the owner's.

    Attributes:
        data: examples of the defended task, for those that are calibrated or trained.
        head: of the defended task, for those that need one.
        encoder: prepares the examples; None for the expert's own.
        generic: inputs of other kinds than the task's, for those that train and keep what the expert does with these.
        siblings: fine-tunes of the base, for those that mix some in.
    """

    data: Path | None = None
    head: Path | None = None
    encoder: Path | None = None
    generic: Path | None = None
    siblings: tuple[Path, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the function stays as it is, and a key leads back."""
        return all(step.has_key for step in steps_of(self.method, self.settings))

    @property
    def keeps_basis(self) -> bool:
        """Whether it edits or trains weights where the expert has them, by code of this package: there is nothing to
        recognise then, however far they go."""
        return all(
            step.requirements.stage == "weights"
            and not step.has_key
            and all(type(one).__module__.startswith("unmergeable.") for one in step.single)
            for step in steps_of(self.method, self.settings)
        )

    @property
    def reads(self) -> frozenset[str]:
        """What of the owner's it takes with its settings: data, head, encoder, generic, siblings."""
        return protection_reads(self.method, self.settings)

    @property
    def paths(self) -> tuple[Path, ...]:
        files = (self.data, self.head, self.encoder, self.generic)
        return (*(path for path in files if path is not None), *self.siblings)

    def given(self, owner: ExpertEntry) -> ProtectionEntry:
        """The same with what it reads of the owner of an expert; siblings of its own come first."""
        return replace(
            self,
            data=owner.data if "data" in self.reads else None,
            head=owner.head if "head" in self.reads else None,
            siblings=(self.siblings or owner.siblings) if "siblings" in self.reads else (),
        )

    def require_reads(self, where: str) -> None:
        """Raises BadInput unless it is given what it reads, as many siblings as it wants, and nothing else."""
        for what in OWNED:
            value = getattr(self, what)
            if value and what not in self.reads:
                raise BadInput(f"{where}: {self.method} with these settings reads no {what}; leave it out.")
            if not value and what in self.reads and what in ("data", "siblings"):
                raise BadInput(f"{where}: {self.method} reads {what}; give {what}.")
        try:
            require_siblings(self.method, self.settings, len(self.siblings))
        except UsageError as error:
            raise BadInput(f"{where}: {error}") from None


@dataclass(frozen=True)
class RecoveryEntry:
    """Attacks on a release under one name, each on what the one before it gave.

    ``sources``: public fine-tunes of the base.
    """

    name: str
    steps: tuple[MethodEntry, ...]
    sources: tuple[Path, ...] = ()

    @property
    def threat_model(self) -> ThreatModel:
        """That of the weakest attacker who can do it."""
        if "defended" in self.examples:
            return ThreatModel.UNLABELLED
        # What comes after the first step works on a student, which is the attacker's own.
        return ThreatModel.BLACK_BOX if self._required[0].access == "answers" else ThreatModel.WHITE_BOX

    @property
    def examples(self) -> frozenset[Whose]:
        """Whose examples its steps read."""
        return frozenset(required.examples for required in self._required if "data" in required.needs)

    @property
    def _required(self) -> list[AttackRequirements]:
        return [attack_requirements(step.method, step.settings) for step in self.steps]

    @property
    def is_of_one_rider(self) -> bool:
        """Whether what it gives depends on whose inputs the attacker has."""
        return "own" in self.examples


@dataclass(frozen=True)
class TaskEntry:
    """What is scored.

    Attributes:
        train: what an attacker with data learns from; None where there is none.
        validation: data the attacker selects on; None in a table, where nobody selects.
        test: data the result is scored on. All three may be one path, whose examples are then split by their content.
        head: turns features into classes (:mod:`unmergeable.tasks.heads`); None for a network that has its own.
        encoder: the folder whose tokenizer or image processor prepares the examples.
        sizes: the most examples of validation and test.
        kind: what is asked, and how an answer is scored (:mod:`unmergeable.tasks`).
    """

    name: str
    train: Path | None
    validation: Path | None
    test: Path
    head: Path | None
    encoder: Path
    sizes: tuple[int, int]
    batch_size: int
    kind: TaskKind

    @property
    def is_split(self) -> bool:
        """Whether one file holds all parts, which the content of an example decides on."""
        return self.validation == self.test

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those that the plan gives."""
        given: dict[Part, Path | None] = {"train": self.train, "validation": self.validation, "test": self.test}
        return tuple(part for part, path in given.items() if path is not None)

    def data(self, part: Part) -> Path:
        """Where a part lies, which must be given."""
        path: Path | None = getattr(self, part)
        assert path is not None
        return path

    def size(self, part: Part) -> int:
        """The most examples of a part that is scored: of any but ``train``."""
        assert part != "train"
        return self.sizes[0 if part == "validation" else 1]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything its scores depend on besides weights and encoder."""
        read = (self.train, self.validation, self.test, self.head)
        return (*(path for path in read if path is not None), *self.paths_of_kind)

    @property
    def paths_of_kind(self) -> tuple[Path, ...]:
        """The files and folders that its settings name."""
        return tuple(Path(path) for path in (getattr(self.kind, name) for name in self.kind.paths) if path)


def read_expert(item: object, where: str, folder: Path, *, is_owner: bool = False) -> ExpertEntry:
    """A fine-tune and its task; ``is_owner``: and what a protection of it may read."""
    entry = Entry(item, ("name", "path", "task", *(("data", "head", "siblings") if is_owner else ())), where)
    return ExpertEntry(
        entry.name(),
        entry.checkpoint("path", folder),
        entry.text("task"),
        data=entry.checkpoint("data", folder) if "data" in entry else None,
        head=entry.path("head", folder) if "head" in entry else None,
        siblings=entry.checkpoints("siblings", folder),
    )


def read_protection(item: object, where: str, folder: Path, *, owned: Sequence[str] = OWNED) -> ProtectionEntry:
    """A name, or a method with settings and what it reads of the owner's: those things that the entry may name."""
    entry = _named(item, ("name", "method", "settings", *owned), where)
    method = entry.text("method")
    protection = ProtectionEntry(
        name=entry.name(default=method),
        method=method,
        # Refuses unknown methods and settings. What protects by default is part of what is audited.
        settings=effective_settings(method, entry.mapping("settings")),
        data=entry.path("data", folder) if "data" in entry else None,
        head=entry.path("head", folder) if "head" in entry else None,
        encoder=entry.checkpoint("encoder", folder) if "encoder" in entry else None,
        generic=entry.path("generic", folder) if "generic" in entry else None,
        siblings=entry.checkpoints("siblings", folder),
    )
    if owned == OWNED:
        protection.require_reads(where)
    return protection


def read_merge(item: object, where: str) -> MergeEntry:
    """A name, or a method with settings."""
    entry = _named(item, ("name", "method", "settings"), where)
    method = entry.text("method")
    merge = MergeEntry(entry.name(default=method), method, entry.mapping("settings"))
    _require_known(merge, where, "merge", MERGES)
    if merge_learns(method) and method != AdaMerging.name:
        raise BadInput(f"{where}: {method} needs data, which no attacker here merges with; adamerging can.")
    return merge


def read_table_merge(item: object, where: str) -> MergeEntry:
    """A name, or a method with settings, coefficients, and what is done to the merge."""
    entry = _named(item, ("name", "method", "settings", "coefficient", "coefficients", "then"), where)
    if "coefficient" in entry and "coefficients" in entry:
        raise BadInput(f"{where}: give either coefficient or coefficients, of which the best is taken.")
    coefficients: tuple[float, ...] = (entry.number("coefficient"),) if "coefficient" in entry else ()
    if "coefficients" in entry:
        coefficients = entry.numbers("coefficients", ())
    method = entry.text("method")
    then = read_step(entry.document("then"), f"{where}, then") if "then" in entry else None
    name = method
    if coefficients:
        name += ", best" if len(coefficients) > 1 else f", {coefficients[0]:g}"
    if then is not None:
        name += f", then {then.name}"
    merge = MergeEntry(entry.name(default=name), method, entry.mapping("settings"), coefficients, then)
    _require_known(merge, where, "merge", MERGES)
    if merge_learns(method):
        raise BadInput(f"{where}: {method} learns from data; a table has fixed merges, an audit learns.")
    if then is not None and then.method not in ON_MERGES:
        raise BadInput(f"{where}, then: {then.method} works on releases; list it among the recoveries.")
    return merge


def read_recovery(item: object, where: str, folder: Path) -> RecoveryEntry:
    """A name, several with commas between them, a method with settings, or a list of steps."""
    if isinstance(item, str):
        recovery = RecoveryEntry(item, tuple(read_step(part.strip(), where) for part in item.split(",")))
    else:
        entry = Entry(item, ("name", "method", "settings", "steps", "sources"), where)
        if ("method" in entry) == ("steps" in entry):
            raise BadInput(f"{where}: give either a method or steps, a list of methods.")
        if "steps" in entry:
            steps = entry.listed("steps", read_step)
        else:
            steps = (read_step({"method": entry.text("method"), "settings": entry.mapping("settings")}, where),)
        name = entry.name(default=joined(step.method for step in steps))
        recovery = RecoveryEntry(name, steps, entry.checkpoints("sources", folder))
    _require_sensible(recovery, where)
    return recovery


def read_step(item: object, where: str) -> MethodEntry:
    """One attack: a name, or a method with settings."""
    entry = _named(item, ("name", "method", "settings"), where)
    method = entry.text("method")
    step = MethodEntry(entry.name(default=method), method, entry.mapping("settings"))
    _require_known(step, where, "recovery", ATTACKS)
    return step


def joined(methods: Iterable[str]) -> str:
    """What steps are called that have no name."""
    return ", then ".join(methods)


def _require_sensible(recovery: RecoveryEntry, where: str) -> None:
    for step in recovery.steps:
        if step.method in ON_MERGES:
            raise BadInput(f"{where}: {step.method} works on merges, not on releases; few_shot trains merges.")
    needed = {step.method: attack_requirements(step.method, step.settings) for step in recovery.steps}
    wanted = [method for method, required in needed.items() if "sources" in required.needs]
    # What reads a free-rider's own examples starts from its own model.
    if any(needed[method].examples == "defended" for method in wanted) and not recovery.sources:
        raise BadInput(f"{where}: {wanted[0]} needs sources, public fine-tunes of the base; list some.")
    if recovery.sources and not wanted:
        raise BadInput(f"{where}: none of its methods reads sources; leave them out.")


def _require_known(entry: MethodEntry, where: str, kind: str, registry: Mapping[str, type]) -> None:
    require_named(entry.method, registry, kind, where)
    configure(registry[entry.method], entry.settings)


def _named(item: object, known: Sequence[str], where: str) -> Entry:
    """An entry that may be written as the name of its method alone."""
    return Entry({"method": item} if isinstance(item, str) else item, known, where)


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
        name=entry.name(),
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
    require_named(name, TASKS, "kind of task", entry.where)
    if name != Classification.name and "head" in entry:
        raise BadInput(f"{entry.where}: {name} has no use for a head; leave it out.")
    settings = dict(entry.mapping("settings"))
    paths = Entry({key: settings[key] for key in TASKS[name].paths if key in settings}, TASKS[name].paths, entry.where)
    return configure(
        TASKS[name], settings | {key: str(paths.path(key, folder)) for key in TASKS[name].paths if key in paths}
    )
