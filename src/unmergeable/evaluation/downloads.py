"""What a plan names on the hub, as local folders: checkpoints, data, and entries that hold some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unmergeable.checkpoint.hub import download, is_on_hub
from unmergeable.data import download_data
from unmergeable.evaluation.plan import RecoveryEntry, TaskEntry


def local_checkpoint(path: Path) -> Path:
    """A folder; downloaded if the path is a name on the hub. Raises UsageError, BadInput when it cannot be."""
    return download(str(path)) if is_on_hub(str(path)) else path


def local_data(path: Path) -> Path:
    """The same for data."""
    return download_data(str(path)) if is_on_hub(str(path)) else path


def recovery_downloaded(entry: RecoveryEntry) -> RecoveryEntry:
    """With local sources."""
    return replace(entry, sources=tuple(local_checkpoint(path) for path in entry.sources))


def task_downloaded(task: TaskEntry) -> TaskEntry:
    """With local data and a local encoder."""
    return replace(
        task,
        encoder=local_checkpoint(task.encoder),
        train=task.train and local_data(task.train),
        validation=task.validation and local_data(task.validation),
        test=local_data(task.test),
    )
