"""What the plans of audits and of tables have in common: models, methods and tasks, checked and by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from unmergeable.checkpoint.hub import download, is_on_hub
from unmergeable.data import download_data
from unmergeable.evaluation.plans.entries import ExpertEntry, MergeEntry, ProtectionEntry, RecoveryEntry, TaskEntry
from unmergeable.evaluation.plans.fields import require_named, require_unique
from unmergeable.evaluation.plans.releases import ReleaseEntry

AnyPlan = TypeVar("AnyPlan", bound="Plan")

_DATA = ("data", "train", "validation", "test")
"""Fields of entries that name data; all other paths on the hub are checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan, checked. ``document`` is the plan as it was written; ``releases`` are of audits."""

    base: Path
    experts: tuple[ExpertEntry, ...]
    protections: tuple[ProtectionEntry, ...]
    recoveries: tuple[RecoveryEntry, ...]
    merges: tuple[MergeEntry, ...]
    tasks: tuple[TaskEntry, ...]
    document: Mapping[str, Any]
    releases: tuple[ReleaseEntry, ...] = ()

    def expert(self, name: str) -> ExpertEntry:
        """The expert of this name, which must exist."""
        return next(expert for expert in self.experts if expert.name == name)

    def task(self, name: str) -> TaskEntry:
        """The task of this name, which must exist."""
        return next(task for task in self.tasks if task.name == name)

    def as_released(self) -> Iterable[tuple[ProtectionEntry, ExpertEntry]]:
        """Every protection with what it reads of an owner, and whose expert it is applied to."""
        return ()

    @property
    def defended_task(self) -> str:
        """The task of what releases were made of; only audits have them."""
        raise NotImplementedError

    def labelled(self, task: TaskEntry) -> int:
        """How many labelled examples of a task somebody learns from at least; 0 where nobody needs labels."""
        return 0

    @property
    def paths(self) -> tuple[Path, ...]:
        read = [self.base, *(expert.path for expert in self.experts)]
        read += [path for task in self.tasks for path in task.paths]
        read += [path for protection, _ in self.as_released() for path in protection.paths]
        read += [path for release in self.releases for path in release.paths]
        read += [path for recovery in self.recoveries for path in recovery.sources]
        return tuple(dict.fromkeys(read))

    def downloaded(self: AnyPlan) -> AnyPlan:
        """The plan with local folders in place of the checkpoints and the data that it names on the hub.

        Raises:
            UsageError, BadInput: as :func:`unmergeable.checkpoint.hub.download` and
                :func:`unmergeable.data.download_data` do.
        """
        lists = ("experts", "protections", "releases", "recoveries", "tasks")
        local: dict[str, Any] = {name: tuple(map(_downloaded, getattr(self, name))) for name in lists}
        return replace(self, base=_local(self.base, download), **local)

    def require_names(self, where: str, victims: Iterable[str]) -> None:
        """Raises BadInput for a name that is there twice, or that stands for nothing; ``victims``: of experts."""
        for kind in ("experts", "tasks", "recoveries", "merges"):
            require_unique([entry.name for entry in getattr(self, kind)], f"{where}, {kind}")
        released = [*(entry.name for entry in self.protections), *(entry.name for entry in self.releases)]
        require_unique(released, f"{where}, protect, methods")
        for name in victims:
            require_named(name, [entry.name for entry in self.experts], "expert", f"{where}, protect")
        for expert in self.experts:
            require_named(expert.task, [entry.name for entry in self.tasks], "task", f"{where}, expert {expert.name}")


def _downloaded(entry: Any) -> Any:
    """An expert, a method or a task of the plan with local folders in all its fields."""
    local: dict[str, Path | tuple[Path, ...]] = {}
    weights = partial(download, with_code=True) if getattr(entry, "trust_remote_code", False) else download
    for field in fields(entry):
        value, fetch = getattr(entry, field.name), download_data if field.name in _DATA else weights
        if isinstance(value, Path):
            local[field.name] = _local(value, fetch)
        elif isinstance(value, tuple) and all(isinstance(item, Path) for item in value):
            local[field.name] = tuple(_local(path, fetch) for path in value)
    return replace(entry, **local)


def _local(path: Path, fetch: Callable[[str], Path]) -> Path:
    return fetch(str(path)) if is_on_hub(str(path)) else path
