"""What a table is to hold: experts, each protected and merged with groups of others by fixed merges.

An audit looks for the worst case around one expert; a table says what published settings give, over every expert and
every group, so that it can be laid beside the table of a paper. :mod:`unmergeable.evaluation.table_file` reads it from
YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from unmergeable.evaluation.plan import ExpertEntry, MethodEntry, ProtectionEntry, RecoveryEntry, TaskEntry, paths_of

UNPROTECTED = "unprotected"
"""The variant that every other is compared with."""

MERGED = {1: "pairs", 2: "triples"}
"""What victim and partners are called together, by the number of partners."""


@dataclass(frozen=True)
class OwnedExpert(ExpertEntry):
    """An expert with what a protection of it may read of its owner's."""

    data: Path | None = None
    head: Path | None = None
    siblings: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TableMerge(MethodEntry):
    """A merge with the coefficient of every expert in it; None for the method's own."""

    coefficient: float | None = None


@dataclass(frozen=True)
class VariantName:
    """One thing that is merged: the expert itself, protected, or recovered after that."""

    protection: str | None = None
    recovery: str | None = None

    def __str__(self) -> str:
        if self.protection is None:
            return UNPROTECTED
        return self.protection if self.recovery is None else f"{self.protection}, after {self.recovery}"


Partners = int | tuple[str, ...]
"""Every group of so many others, or one group by its names."""


@dataclass(frozen=True)
class TablePlan:
    """A table, checked.

    Attributes:
        victims: names of the experts that are protected.
        protections: without what they read, which is the victim's.
        published: figures of the paper, by their :meth:`labels`.
        document: the plan as it was written.
    """

    title: str
    source: str
    base: Path
    experts: tuple[OwnedExpert, ...]
    victims: tuple[str, ...]
    protections: tuple[ProtectionEntry, ...]
    recoveries: tuple[RecoveryEntry, ...]
    merges: tuple[TableMerge, ...]
    partners: tuple[Partners, ...]
    tasks: tuple[TaskEntry, ...]
    seed: int
    published: Mapping[str, float | str]
    document: Mapping[str, Any]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything the table reads, each once."""
        protections = [self.given(entry, victim) for victim in self.victims for entry in self.protections]
        return paths_of(self.base, self.experts, self.tasks, protections, self.recoveries)

    def expert(self, name: str) -> OwnedExpert:
        """The expert of this name, which must exist."""
        return next(expert for expert in self.experts if expert.name == name)

    def task(self, name: str) -> TaskEntry:
        """The task of this name, which must exist."""
        return next(task for task in self.tasks if task.name == name)

    @property
    def other_tasks(self) -> tuple[str, ...]:
        """The tasks of no expert: what a protection costs elsewhere is measured on them."""
        own = {expert.task for expert in self.experts}
        return tuple(task.name for task in self.tasks if task.name not in own)

    def given(self, entry: ProtectionEntry, victim: str) -> ProtectionEntry:
        """A protection with what it reads of the victim's owner."""
        owned = self.expert(victim)
        return replace(
            entry,
            data=owned.data if "data" in entry.reads else None,
            head=owned.head if "head" in entry.reads else None,
            siblings=owned.siblings if "siblings" in entry.reads else (),
        )

    def groups(self, victim: str) -> tuple[tuple[str, ...], ...]:
        """The partners that the victim is merged with, group by group, each in the order of the experts."""
        others = [expert.name for expert in self.experts if expert.name != victim]
        found: list[tuple[str, ...]] = []
        for wanted in self.partners:
            if isinstance(wanted, int):
                found += combinations(others, wanted)
            elif victim not in wanted:
                found.append(tuple(name for name in others if name in wanted))
        return tuple(dict.fromkeys(found))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many partners the groups have, in rising order."""
        return tuple(sorted({len(group) for victim in self.victims for group in self.groups(victim)}))

    @property
    def variants(self) -> tuple[VariantName, ...]:
        """Everything that is merged."""
        recoveries = [None, *(recovery.name for recovery in self.recoveries)]
        protected = [VariantName(entry.name, recovery) for entry in self.protections for recovery in recoveries]
        return (VariantName(), *protected)

    def label(self, variant: VariantName, merge: TableMerge, size: int) -> str:
        """What an average of the table is called."""
        kind = f" / {merged(size)}" if len(self.sizes) > 1 else ""
        return f"{variant} / {merge.name}{kind}"

    @property
    def _victims_alone(self) -> tuple[str, ...]:
        released = [f"{victim} / {entry.name} / alone" for victim in self.victims for entry in self.protections]
        return (*(f"{victim} / alone" for victim in self.victims), *released)

    @property
    def labels(self) -> tuple[str, ...]:
        """What every figure of the table is called."""
        averages = [
            self.label(variant, merge, size)
            for merge in self.merges
            for size in self.sizes
            for variant in self.variants
        ]
        alone = [f"base / {task.name}" for task in self.tasks]
        alone += [f"{expert.name} / alone" for expert in self.experts]
        alone += [label for label in self._victims_alone if label not in alone]
        alone += [f"{label} / {task}" for task in self.other_tasks for label in self._victims_alone]
        rows = [f"{victim} / {average}" for victim in self.victims for average in averages]
        return (*averages, *alone, *rows, *(f"drop ratio / {average}" for average in averages))


def merged(size: int) -> str:
    """What groups with so many partners are called."""
    return MERGED.get(size, f"groups of {size + 1}")
