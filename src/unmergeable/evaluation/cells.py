"""Cells: what one set of weights scores on one part of the data, kept under a name made of everything it depends on.

A killed audit finds its cells again, and attacks that share a merge share its cell. A cell is written whole or not at
all. What it depends on is its *recipe*: digests of checkpoints and data, the merge and its settings, coefficients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unmergeable.checkpoint.disk import replace_file
from unmergeable.checkpoint.manifest import record_file
from unmergeable.errors import CheckpointError

FORMAT = 2
"""Raised when a cell comes to mean something else; cells of other formats are not found."""

Credits = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Credits by task, each float64 [examples], and the processor time it took, in seconds."""

    recipe: Mapping[str, Any]
    credits: Mapping[str, Credits]
    cpu_seconds: float


class CellStore:
    """The cells in a folder, one file for each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, recipe: Mapping[str, Any]) -> Cell | None:
        """The cell of a recipe; None if it was not computed, or its file is not a cell."""
        try:
            stored = json.loads(self._path(recipe).read_text())
            credits_by_task = {task: np.array(values, float) for task, values in stored["credits"].items()}
            return Cell(recipe, credits_by_task, float(stored["cpu_seconds"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, cell: Cell) -> None:
        """Keep a cell.

        Raises:
            CheckpointError: it cannot be written.
        """
        document = {
            "recipe": cell.recipe,
            "credits": {task: [round(value, 12) for value in values] for task, values in cell.credits.items()},
            "cpu_seconds": cell.cpu_seconds,
        }
        replace_file(self._path(cell.recipe), json.dumps(document).encode())

    def _path(self, recipe: Mapping[str, Any]) -> Path:
        return self._folder / f"{identity(recipe)}.json"


def identity(recipe: Mapping[str, Any]) -> str:
    """The name of what a recipe makes: 32 hexadecimal digits."""
    text = json.dumps([FORMAT, recipe], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_of(path: Path) -> str:
    """The hash of a file's bytes, or of a folder's files: names and bytes of all of them, at any depth.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        records = [record_file(file, "" if file == path else str(file.relative_to(path))) for file in files]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
    listing = json.dumps([[record.name, record.size, record.sha256] for record in records])
    return hashlib.sha256(listing.encode()).hexdigest()
