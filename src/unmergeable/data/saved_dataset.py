"""``saved``: a folder that ``datasets`` wrote with ``save_to_disk``. Rows hold ``text`` or ``image``, and ``label``."""

from __future__ import annotations

import importlib
from pathlib import Path

from unmergeable.data.columns import Columns
from unmergeable.data.records import Fields, Records, reading
from unmergeable.errors import BadInput, UsageError

_SEVERAL = "dataset_dict.json"
_MARKERS = (_SEVERAL, "state.json")


def is_saved(path: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` writes."""
    return any((path / marker).is_file() for marker in _MARKERS)


def open_records(path: Path, fields: Fields) -> Records:
    """The rows of a data set, memory-mapped.

    Raises:
        UsageError: ``datasets`` is not installed.
        BadInput: not such a folder; or one that holds several data sets.
    """
    if not is_saved(path):
        raise BadInput(f"{path} was not written by save_to_disk; give such a folder.")
    if (path / _SEVERAL).is_file():
        inner = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise BadInput(f"{path} holds several data sets; give one of them: {', '.join(str(path / n) for n in inner)}.")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError("datasets is not installed; pip install datasets") from None
    with reading(str(path), "not readable as a data set", "write it again"):
        rows = datasets.load_from_disk(str(path))
    return Columns(path, rows, fields)
