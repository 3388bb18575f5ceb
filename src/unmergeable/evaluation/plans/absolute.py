"""A plan with absolute paths, which means the same wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.hub import is_on_hub
from unmergeable.tasks import TASKS, Classification

_PATHS = frozenset(
    ("base", "path", "checkpoint", "recovered", "data", "train", "validation", "test", "head", "encoder", "generic")
)
_LISTS = frozenset(("siblings", "sources"))


def absolute_paths(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A document of a plan whose relative paths, in every entry, start in ``folder``; names on the hub stay."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if key == "settings":  # of a method; only those of a task may name files
            kind = TASKS.get(document.get("kind") or Classification.name)
            found[key] = {
                name: _absolute(v, folder) if name in getattr(kind, "paths", ()) else v for name, v in value.items()
            }
        elif key in _PATHS and isinstance(value, str):
            found[key] = _absolute(value, folder)
        elif key in _LISTS:
            found[key] = [_absolute(item, folder) for item in value]
        else:
            found[key] = _inside(value, folder)
    return found


def _inside(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return absolute_paths(value, folder)
    return [_inside(item, folder) for item in value] if isinstance(value, list) else value


def _absolute(path: str, folder: Path) -> str:
    return path if is_on_hub(path) else str(folder / path)
