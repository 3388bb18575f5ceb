"""What an audit is to do: experts, protections, attacks, tasks.

:mod:`unmergeable.evaluation.plan_file` reads it from YAML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from unmergeable.attacks import ATTACKS, FewShot
from unmergeable.attacks.few_shot import parse_rates
from unmergeable.evaluation.analysis_settings import AnalysisSettings
from unmergeable.merges import MERGES
from unmergeable.ops.steps import steps_of
from unmergeable.settings import configure
from unmergeable.tasks import TaskKind

Tier = Literal["T0", "T1", "T2", "T3"]
"""What the attacker has. T0: ordinary tools to merge. T1: the base and the method as well, but no data. T2: labelled
examples of the defended task, too. T3: unlabelled examples besides, as many as there are. Tiers contain the lower ones.
"""

Part = Literal["train", "validation", "test"]

DEFENDED_COEFFICIENTS = (0.2, 0.5, 1.0, 1.5)
RIDER_COEFFICIENTS = (0.0, 0.5, 1.0, 1.5)
REFINEMENTS = 8
CONNECTIVITY = 11
VALIDATION, TEST = 200, 500

LEARNING_RATES = "1e-5,3e-5,1e-4,3e-4"
"""Lower than those of few_shot alone: on a vision transformer with a head that is not trained, 1e-4 is too much."""


@dataclass(frozen=True)
class ExpertEntry:
    """A fine-tune of the base, and the task it was tuned for."""

    name: str
    path: Path
    task: str


@dataclass(frozen=True)
class MethodEntry:
    """A merge, or one step of a recovery, with settings, under a name of its own."""

    name: str
    method: str
    settings: Mapping[str, Any]

    @property
    def tier(self) -> Tier:
        """The lowest one whose attacker can do it."""
        if self.method in MERGES:
            is_learnt = MERGES[self.method]().needs_data
        else:
            is_learnt = self.method in ATTACKS and "data" in ATTACKS[self.method]().requirements().needs
        return "T3" if is_learnt else "T0"


@dataclass(frozen=True)
class ProtectionEntry:
    """A protection (or several, separated by commas) with what it reads of the owner's, under a name of its own.

    Attributes:
        data: examples of the defended task, for those that are calibrated or trained.
        head: of the defended task, for those that need one.
        encoder: prepares the examples; None for the expert's own.
        siblings: fine-tunes of the base, for those that mix some in.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    data: Path | None = None
    head: Path | None = None
    encoder: Path | None = None
    siblings: tuple[Path, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the function stays as it is, and a key leads back."""
        return all(step.has_key for step in steps_of(self.method, self.settings))

    @property
    def reads(self) -> frozenset[str]:
        """What of the owner's it takes with its settings: data, head, encoder, siblings."""
        return frozenset[str]().union(*(step.reads for step in steps_of(self.method, self.settings)))

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything it reads."""
        return (*(path for path in (self.data, self.head, self.encoder) if path is not None), *self.siblings)


@dataclass(frozen=True)
class RecoveryEntry:
    """Recoveries under one name, each of what the one before it gave. ``sources``: public fine-tunes of the base."""

    name: str
    steps: tuple[MethodEntry, ...]
    sources: tuple[Path, ...] = ()

    @property
    def tier(self) -> Tier:
        """The lowest one whose attacker can do it."""
        return max("T1", *(step.tier for step in self.steps))


@dataclass(frozen=True)
class TaskEntry:
    """What is scored.

    Attributes:
        train: what an attacker of tier T2 or T3 learns from; None where there is none.
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

    def data(self, part: Part) -> Path:
        """Where a part lies. ``train`` must be given to be asked for."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}[part]
        assert found is not None
        return found

    def size(self, part: Literal["validation", "test"]) -> int:
        """The most examples of a part."""
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


@dataclass(frozen=True)
class FewShotEntry:
    """What an attacker of tier T2 does: ``settings`` are of :class:`unmergeable.attacks.FewShot`.

    Attributes:
        samples: labelled examples of the defended task; with each number the attacker is another one.
        starts: the best merges, each of which is trained.
    """

    samples: tuple[int, ...] = (16, 100)
    starts: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)

    def methods(self, samples: int) -> tuple[FewShot, ...]:
        """One for each learning rate."""
        whole = configure(FewShot, {"learning_rates": LEARNING_RATES, **self.settings, "samples": samples})
        return tuple(replace(whole, learning_rates=repr(rate)) for rate in parse_rates(whole.learning_rates))


@dataclass(frozen=True)
class Coefficients:
    """The coarse grid of the defended expert's and the free-rider's coefficient, and how many points refine it."""

    defended: tuple[float, ...] = DEFENDED_COEFFICIENTS
    rider: tuple[float, ...] = RIDER_COEFFICIENTS
    refinements: int = REFINEMENTS


@dataclass(frozen=True)
class Plan:
    """An audit, checked. ``analyses`` is None for an audit without; ``document`` is the plan as it was written.

    ``connectivity``: how many points of the line between two models are scored, its ends among them; 0 for none.
    """

    base: Path
    experts: tuple[ExpertEntry, ...]
    defended: str
    protections: tuple[ProtectionEntry, ...]
    merges: tuple[MethodEntry, ...]
    recoveries: tuple[RecoveryEntry, ...]
    coefficients: Coefficients
    tiers: tuple[Tier, ...]
    few_shot: FewShotEntry
    tasks: tuple[TaskEntry, ...]
    seeds: tuple[int, ...]
    connectivity: int
    analyses: AnalysisSettings | None
    document: Mapping[str, Any]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything the audit reads, each once."""
        return paths_of(self.base, self.experts, self.tasks, self.protections, self.recoveries)

    def reaches(self, tier: Tier) -> bool:
        """Whether the strongest attacker is of this tier or a higher one."""
        return self.tiers[-1] >= tier

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


def paths_of(
    base: Path,
    experts: Iterable[ExpertEntry],
    tasks: Iterable[TaskEntry],
    protections: Iterable[ProtectionEntry],
    recoveries: Iterable[RecoveryEntry],
) -> tuple[Path, ...]:
    """Everything these read, each once."""
    found = [base, *(expert.path for expert in experts)]
    found += [path for task in tasks for path in task.paths]
    found += [path for protection in protections for path in protection.paths]
    found += [path for recovery in recoveries for path in recovery.sources]
    return tuple(dict.fromkeys(found))


def joined(steps: Sequence[Mapping[str, Any]]) -> str:
    """What steps are called that have no name."""
    return ", then ".join(step["method"] for step in steps)
