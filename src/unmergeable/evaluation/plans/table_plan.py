"""The plan of a table: which experts are protected by what, and merged with which others how.

    title: Attention locked, eight tasks
    source: MergeLock, arXiv 2509.01548, Table 1
    base: base
    experts:
      - {name: digits, path: expert-digits, task: digits}
      - {name: animals, path: expert-animals, task: animals}
    protect:
      methods: [mergelock]
    recoveries: [kabsch]
    merges:
      - {method: task_arithmetic, coefficient: 0.3}
      - {method: task_arithmetic, coefficients: [0.3, 0.5, 0.7]}
    partners: [1]
    tasks:
      - {name: digits, test: digits.npz, head: digits-head.safetensors}
      - {name: animals, test: animals.npz, head: animals-head.safetensors}

An audit looks for the worst case around one expert; a table says what published settings give, over every expert and
every group, so that it can be laid beside the table of a paper. Experts, protections, recoveries and tasks are written
as in the plan of an audit (docs/tables.md says what differs). Everything that can be wrong with a plan is reported
before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from unmergeable.errors import BadInput
from unmergeable.evaluation.methods import attack_reads
from unmergeable.evaluation.plans.entries import (
    ExpertEntry,
    MergeEntry,
    ProtectionEntry,
    read_expert,
    read_protection,
    read_recovery,
    read_table_merge,
    read_task,
)
from unmergeable.evaluation.plans.fields import Entry, read_document, require_named, require_plain, require_unique
from unmergeable.evaluation.plans.plan import Plan

UNPROTECTED = "unprotected"
"""The variant that every other is compared with."""

MERGED = {1: "pairs", 2: "triples"}
"""What victim and partners are called together, by the number of partners."""

_TOP = (
    "title", "source", "base", "experts", "protect", "recoveries", "merges", "partners", "tasks", "seed", "published",
)  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class TablePlan(Plan):
    """A table, checked.

    Attributes:
        victims: names of the experts that are protected.
        protections: without what they read, which is the victim's.
        published: figures of the paper, by their :meth:`labels`.
    """

    title: str
    source: str
    victims: tuple[str, ...]
    partners: tuple[Partners, ...]
    seed: int
    published: Mapping[str, float | str]

    def as_released(self) -> Iterable[tuple[ProtectionEntry, ExpertEntry]]:
        owners = map(self.expert, self.victims)
        return [(entry.given(owner), owner) for owner in owners for entry in self.protections]

    @property
    def other_tasks(self) -> tuple[str, ...]:
        """The tasks of no expert: what a protection costs elsewhere is measured on them."""
        own = {expert.task for expert in self.experts}
        return tuple(task.name for task in self.tasks if task.name not in own)

    def groups(self, victim: str) -> tuple[tuple[str, ...], ...]:
        """The partners that the victim is merged with, group by group, each in the order of the experts."""
        others = [expert.name for expert in self.experts if expert.name != victim]
        groups: list[tuple[str, ...]] = []
        for wanted in self.partners:
            if isinstance(wanted, int):
                groups += combinations(others, wanted)
            elif victim not in wanted:
                groups.append(tuple(name for name in others if name in wanted))
        return tuple(dict.fromkeys(groups))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many partners the groups have, in rising order."""
        return tuple(sorted({len(group) for victim in self.victims for group in self.groups(victim)}))

    @property
    def variants(self) -> tuple[VariantName, ...]:
        recoveries = [None, *(recovery.name for recovery in self.recoveries)]
        protected = [VariantName(entry.name, recovery) for entry in self.protections for recovery in recoveries]
        return (VariantName(), *protected)

    def label(self, variant: VariantName, merge: MergeEntry, size: int) -> str:
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


def read_table_plan(path: Path, root: Path | None = None) -> TablePlan:
    """A plan from its YAML file, whose paths start at ``root``, or at its folder.

    Raises:
        BadInput: the file cannot be read; an entry is missing, misspelt or means nothing; a path leads nowhere; two
            things have one name. One line, before any compute.
        UsageError: a setting that its method does not have.
    """
    return parse_table_plan(read_document(path, "docs/tables.md"), root or path.parent, str(path))


def parse_table_plan(document: object, folder: Path, where: str = "the plan") -> TablePlan:
    """A plan from its parsed document; ``folder`` is where its paths start. Raises as :func:`read_table_plan` does."""
    require_plain(document, where)
    top = Entry(document, _TOP, where)
    base = top.checkpoint("base", folder)
    experts = top.listed("experts", partial(read_expert, folder=folder, is_owner=True))
    names = {expert.name: None for expert in experts}
    protect = Entry(top.document("protect", {}), ("experts", "methods"), f"{where}, protect")
    plan = TablePlan(
        title=top.text("title"),
        source=top.text("source"),
        base=base,
        experts=experts,
        victims=protect.texts("experts", list(names)),
        protections=protect.listed("methods", partial(read_protection, folder=folder, owned=("siblings",)), default=()),
        recoveries=top.listed("recoveries", partial(read_recovery, folder=folder), default=()),
        merges=top.listed("merges", read_table_merge),
        partners=top.listed("partners", partial(_partners, names=names), default=(1,)),
        tasks=top.listed("tasks", partial(read_task, folder=folder, base=base, selects=False)),
        seed=top.whole("seed", 0, least=0),
        published=_published(top),
        document=dict(document) if isinstance(document, Mapping) else {},
    )
    plan.require_names(where, plan.victims)
    _require_consistent(plan, where)
    return plan


def _partners(item: object, where: str, names: Mapping[str, object]) -> Partners:
    if isinstance(item, int) and not isinstance(item, bool):
        if not 1 <= item < len(names):
            raise BadInput(f"{where}: {item} partners are wanted, and every expert has {len(names) - 1} others.")
        return item
    if not isinstance(item, list | tuple) or not item or not all(isinstance(name, str) for name in item):
        raise BadInput(f"{where}: must be a number of partners or a list of their names, not {item!r}.")
    for name in item:
        require_named(name, names, "expert", where)
    require_unique(list(item), where)
    return tuple(item)


def _published(top: Entry) -> dict[str, float | str]:
    figures: dict[str, float | str] = {}
    for label, value in top.mapping("published").items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise BadInput(f"{top.where}, published: {label!r} must be a number or a text, not {value!r}.")
        figures[label] = value
    return figures


def _require_consistent(plan: TablePlan, where: str) -> None:
    require_unique([str(expert.path) for expert in plan.experts], f"{where}, paths of experts")
    require_unique(plan.victims, f"{where}, protect, experts")
    require_unique([f"{entry.method} {dict(entry.settings)}" for entry in plan.protections], f"{where}, protections")
    for victim in plan.victims:
        if not plan.groups(victim):
            raise BadInput(f"{where}, partners: {victim} has nobody to merge with; add an expert or a group.")
        for entry in plan.protections:
            entry.given(plan.expert(victim)).require_reads(f"{where}, expert {victim}")
    learns = [entry.name for entry in plan.recoveries if "defended" in entry.examples]
    learns += [merge.name for merge in plan.merges if merge.then and "data" in attack_reads(merge.then.method)]
    chooses = [merge.name for merge in plan.merges if len(merge.coefficients) > 1]
    for task in (task for task in plan.tasks if task.name not in plan.other_tasks):
        if chooses and task.validation is None:
            raise BadInput(f"{where}, task {task.name}: {chooses[0]} chooses a coefficient on it; give validation.")
        if learns and (task.train is None or task.is_split):
            raise BadInput(f"{where}, task {task.name}: {learns[0]} reads examples; give train, a file of its own.")
    for merge in plan.merges:
        for size in plan.sizes:
            merge.require_experts(size + 1, where)
    labels = plan.labels
    for label in plan.published:
        require_named(label, labels, "figure of this table", f"{where}, published")
