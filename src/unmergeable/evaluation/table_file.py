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
    partners: [1]
    tasks:
      - {name: digits, test: digits.npz, head: digits-head.safetensors}
      - {name: animals, test: animals.npz, head: animals-head.safetensors}

Experts, protections, recoveries and tasks are written as in the plan of an audit (docs/tables.md says what differs).
Everything that can be wrong with a plan is found before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation.downloads import local_checkpoint, local_data, recovery_downloaded, task_downloaded
from unmergeable.evaluation.fields import Entry, read_document, require_unique
from unmergeable.evaluation.plan import ProtectionEntry, TaskEntry
from unmergeable.evaluation.plan_entries import known_merge, read_recovery, read_task, require_reads
from unmergeable.evaluation.table_plan import OwnedExpert, Partners, TableMerge, TablePlan
from unmergeable.merges import MERGES
from unmergeable.ops.steps import steps_of
from unmergeable.protections import SensitivityShield
from unmergeable.settings import configure, nearest

_TOP = (
    "title", "source", "base", "experts", "protect", "recoveries", "merges", "partners", "tasks", "seed", "published",
)  # fmt: skip


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
    top = Entry(document, _TOP, where)
    base = top.checkpoint("base", folder)
    experts = top.listed("experts", partial(_expert, folder=folder))
    names = {expert.name: None for expert in experts}
    protect = Entry(top.document("protect", {}), ("experts", "methods"), f"{where}, protect")
    plan = TablePlan(
        title=top.text("title"),
        source=top.text("source"),
        base=base,
        experts=experts,
        victims=protect.texts("experts", list(names)),
        protections=protect.listed("methods", _protection, default=()),
        recoveries=top.listed("recoveries", partial(read_recovery, folder=folder), default=()),
        merges=top.listed("merges", _merge),
        partners=top.listed("partners", partial(_partners, names=names), default=(1,)),
        tasks=top.listed("tasks", partial(_task, folder=folder, base=base)),
        seed=top.whole("seed", 0, least=0),
        published=_published(top),
        document=dict(document) if isinstance(document, Mapping) else {},
    )
    _require_consistent(plan, where)
    return plan


def downloaded(plan: TablePlan) -> TablePlan:
    """The plan with everything that it names on the hub as local folders. Raises UsageError, BadInput."""
    return replace(
        plan,
        base=local_checkpoint(plan.base),
        experts=tuple(
            replace(
                expert,
                path=local_checkpoint(expert.path),
                data=expert.data and local_data(expert.data),
                siblings=tuple(local_checkpoint(path) for path in expert.siblings),
            )
            for expert in plan.experts
        ),
        recoveries=tuple(recovery_downloaded(entry) for entry in plan.recoveries),
        tasks=tuple(task_downloaded(task) for task in plan.tasks),
    )


def _expert(item: object, where: str, folder: Path) -> OwnedExpert:
    entry = Entry(item, ("name", "path", "task", "data", "head", "siblings"), where)
    return OwnedExpert(
        entry.text("name"),
        entry.checkpoint("path", folder),
        entry.text("task"),
        data=entry.checkpoint("data", folder) if "data" in entry else None,
        head=entry.path("head", folder) if "head" in entry else None,
        siblings=entry.checkpoints("siblings", folder),
    )


def _protection(item: object, where: str) -> ProtectionEntry:
    """What it reads is the victim's: the experts say it."""
    if isinstance(item, str):
        found = ProtectionEntry(item, item, {})
    else:
        entry = Entry(item, ("name", "method", "settings"), where)
        method = entry.text("method")
        found = ProtectionEntry(entry.text("name", method), method, entry.mapping("settings"))
    _ = found.reads  # refuses unknown methods and settings
    return found


def _merge(item: object, where: str) -> TableMerge:
    if isinstance(item, str):
        found = TableMerge(item, item, {})
    else:
        entry = Entry(item, ("name", "method", "settings", "coefficient"), where)
        method = entry.text("method")
        coefficient = entry.number("coefficient") if "coefficient" in entry else None
        name = method if coefficient is None else f"{method}, {coefficient:g}"
        found = TableMerge(entry.text("name", name), method, entry.mapping("settings"), coefficient)
    known_merge(found, where)
    if found.tier != "T0":
        raise BadInput(f"{where}: {found.method} learns from data; a table has fixed merges, an audit learns.")
    return found


def _partners(item: object, where: str, names: Mapping[str, object]) -> Partners:
    if isinstance(item, int) and not isinstance(item, bool):
        if not 1 <= item < len(names):
            raise BadInput(f"{where}: {item} partners are wanted, and every expert has {len(names) - 1} others.")
        return item
    if not isinstance(item, list | tuple) or not item or not all(isinstance(name, str) for name in item):
        raise BadInput(f"{where}: must be a number of partners or a list of their names, not {item!r}.")
    for name in item:
        if name not in names:
            raise BadInput(f"{where}: no expert is called {name!r}{nearest(name, names)}")
    require_unique(list(item), where)
    return tuple(item)


def _task(item: object, where: str, folder: Path, base: Path) -> TaskEntry:
    return read_task(item, where, folder, base, selects=False)


def _published(top: Entry) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for label, value in top.mapping("published").items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise BadInput(f"{top.where}, published: {label!r} must be a number or a text, not {value!r}.")
        found[label] = value
    return found


def _require_consistent(plan: TablePlan, where: str) -> None:
    require_unique([expert.name for expert in plan.experts], f"{where}, experts")
    require_unique([str(expert.path) for expert in plan.experts], f"{where}, paths of experts")
    require_unique([task.name for task in plan.tasks], f"{where}, tasks")
    require_unique(plan.victims, f"{where}, protect, experts")
    require_unique([str(variant) for variant in plan.variants], f"{where}, protect, methods")
    require_unique([f"{entry.method} {dict(entry.settings)}" for entry in plan.protections], f"{where}, protections")
    require_unique([merge.name for merge in plan.merges], f"{where}, merges")
    names, tasks = ({found.name: None for found in these} for these in (plan.experts, plan.tasks))
    for expert in plan.experts:
        if expert.task not in tasks:
            raise BadInput(
                f"{where}, expert {expert.name}: no task is called {expert.task!r}{nearest(expert.task, tasks)}"
            )
    for victim in plan.victims:
        if victim not in names:
            raise BadInput(f"{where}, protect: no expert is called {victim!r}{nearest(victim, names)}")
        if not plan.groups(victim):
            raise BadInput(f"{where}, partners: {victim} has nobody to merge with; add an expert or a group.")
        for entry in plan.protections:
            _require_given(plan.given(entry, victim), f"{where}, expert {victim}")
    for recovery in plan.recoveries:
        if recovery.tier == "T3":
            raise BadInput(f"{where}, recovery {recovery.name}: it learns from data, which an audit of tier T3 does.")
    for merge in plan.merges:
        for size in plan.sizes:
            _require_mergeable(merge, size, where)
    labels = dict.fromkeys(plan.labels)
    for label in plan.published:
        if label not in labels:
            raise BadInput(f"{where}, published: no figure of this table is called {label!r}{nearest(label, labels)}")


def _require_given(entry: ProtectionEntry, where: str) -> None:
    """The victim must come with what the protection reads, and a shield with a sibling for each coefficient."""
    require_reads(entry, where)
    for step in steps_of(entry.method, entry.settings):
        if SensitivityShield.name in step.settings:
            shield = configure(SensitivityShield, step.settings[SensitivityShield.name])
            try:
                shield.require_siblings(len(entry.siblings))
            except UsageError as error:
                raise BadInput(f"{where}: {error}") from None


def _require_mergeable(merge: TableMerge, size: int, where: str) -> None:
    """A merge must take as many experts as there are in a group, and the coefficient."""
    method, count = configure(MERGES[merge.method], merge.settings), size + 1
    most = method.most_experts or count
    if not method.fewest_experts <= count <= most:
        raise BadInput(f"{where}, merge {merge.name}: {merge.method} takes {most} experts, not {count}.")
    try:
        method.resolve([merge.coefficient] * count)
    except UsageError as error:
        raise BadInput(f"{where}, merge {merge.name}: {error}") from None
