"""What a run of an audit and of a table have in common: a folder that no other run works in, hashes, a pool, names.

Everything computed lies in the folder under content-addressed names, so that the same command resumes after whatever
stopped it:

    OUT/models/   protected and recovered checkpoints
    OUT/cells/    scores
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import creating, write_error
from unmergeable.errors import BadInput
from unmergeable.evaluation.cells import digest_of
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.plans.entries import TaskEntry
from unmergeable.evaluation.plans.plan import Plan
from unmergeable.evaluation.preflight import data_checks, require_models
from unmergeable.evaluation.scoring import Checkpoint, ScoredTask
from unmergeable.pools.pool import Call, Pool, run_all
from unmergeable.progress import Progress

LOCK = "lock"


@dataclass(frozen=True)
class Run:
    """A plan at work. ``folder`` is resolved; ``digests``: of every path of the plan."""

    plan: Plan
    folder: Path
    digests: Mapping[Path, str]
    pool: Pool
    progress: Progress

    @property
    def cells(self) -> Path:
        return self.folder / "cells"

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def checkpoint(self, path: Path) -> Checkpoint:
        return Checkpoint(path, self.digests[path])

    def scored(self, entry: TaskEntry, *, prepared_by: Path | None = None) -> ScoredTask:
        """A task with the digests of what its credits depend on; ``prepared_by``: an encoder of its own."""
        task = ScoredTask.of(entry, self.digests)
        if prepared_by is None:
            return task
        own = self.digests[prepared_by]
        return replace(task, digests={part: f"{digest} {own}" for part, digest in task.digests.items()})

    def done(self, stage: str, calls: Sequence[Call], unit: str) -> list[Any]:
        """What all calls give, in their order."""
        return run_all(self.pool, calls, stage, unit, self.progress)

    def without_paths(self, reason: str, made: Iterable[tuple[str, Variant]]) -> str:
        """A reason with names in place of paths, so that results do not depend on the machine.

        Args:
            reason: why something could not be done.
            made: what was made, each with what it is called.
        """
        names = {str(expert.path): expert.name for expert in self.plan.experts}
        names |= {str(variant.checkpoint.path): name for name, variant in made if variant.checkpoint is not None}
        names[str(self.plan.base)] = "the base"
        for path in sorted(names, key=len, reverse=True):  # one may begin as another does
            reason = reason.replace(path, names[path])
        return reason

    def facts(self) -> dict[str, Any]:
        """What stands in every result: the plan, the machine, the inputs."""
        return {
            "plan": self.plan.document,
            "environment": _environment(),
            "digests": {path.name: digest for path, digest in self.digests.items()},
            "tasks": {task.name: {"kind": task.kind.name, **task.kind.facts()} for task in self.plan.tasks},
        }


@contextmanager
def begun(plan: Plan, out: Path, kind: str, pool: Callable[[], Pool], progress: Progress) -> Iterator[Run]:
    """A run in a folder, new or that of an earlier run of the same ``kind``, for as long as the context lasts.

    All models and examples of the plan are looked at before the folder is there.

    Raises:
        BadInput: the folder is something else's, or another run is in it; a model or data of the plan cannot be used.
        UsageError: something is not installed.
        CheckpointError: something cannot be read or written.
    """
    _require_free(out, kind)
    with looked_at(plan, out, pool, progress) as run, locked(_prepared(out)):
        yield run


@contextmanager
def looked_at(plan: Plan, out: Path, pool: Callable[[], Pool], progress: Progress) -> Iterator[Run]:
    """A run whose models and examples can all be used; nothing is written.

    Raises:
        BadInput, UsageError: one of them cannot be used.
    """
    require_models(plan)
    digests = _hashed(plan.paths, progress)
    with pool() as workers:
        run = Run(plan, out.resolve(), digests, workers, progress)
        run.done("checking data", data_checks(plan, digests, run.scored), "files")
        yield run


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is inside with this folder. The lock goes with the process, however that ends.

    Raises:
        BadInput: another process is there.
        CheckpointError: the lock file cannot be written.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{folder} is the folder of a table or an audit that is running: wait for it to end, or name another."
            ) from None
        except OSError as error:
            raise write_error(path, error) from error
        yield
    finally:
        os.close(descriptor)


def _require_free(out: Path, kind: str) -> None:
    """Raises BadInput unless a folder is new or that of an earlier audit or table (``kind``)."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; name a folder for the {kind}.")
    if out.is_dir() and any(out.iterdir()) and not (out / "cells").is_dir():
        raise BadInput(f"{out} is not empty and not the folder of an earlier {kind}; name another.")


def _prepared(out: Path) -> Path:
    """The folder with what every run has in it. Raises BadInput when it cannot be created."""
    for name in ("cells", "models"):
        with creating(out):
            (out / name).mkdir(parents=True, exist_ok=True)
    return out


def _hashed(paths: Sequence[Path], progress: Progress) -> dict[Path, str]:
    digests = {}
    for number, path in enumerate(paths, start=1):
        digests[path] = digest_of(path)
        progress("hashing inputs", number, len(paths), "files")
    return digests


def _environment() -> dict[str, Any]:
    return {
        "unmergeable": version("unmergeable"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
    }
