"""Cells: what one set of weights scores on one part of the data, kept under a name made of everything it depends on.

A killed audit finds its cells again, and attacks that share a merge share its cell. A file is written whole or not at
all; the cell in it may hold the first examples only, where no more were needed. What it depends on is its *recipe*:
digests of checkpoints and data, the merge and its settings, coefficients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unmergeable.checkpoint.disk import replace_file
from unmergeable.checkpoint.manifest import FileRecord, record_file
from unmergeable.errors import CheckpointError

FORMAT = 2
"""Raised when a cell comes to mean something else; cells of other formats are not found."""

Credits = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Credits by task, each float64 [examples], and the processor time it took, in seconds.

    One that is not whole holds the first examples of each task, up to one number of them: all where there are fewer.
    """

    recipe: Mapping[str, Any]
    credits: Mapping[str, Credits]
    cpu_seconds: float
    is_whole: bool = True

    @property
    def met(self) -> int:
        """How many examples there are of the task with the most."""
        return max((len(credited) for credited in self.credits.values()), default=0)

    def first(self, count: int) -> Cell:
        """What it would be after the first ``count`` examples of each task; the time is that of all."""
        if self.met <= count:
            return self
        credits_by_task = {task: credited[:count] for task, credited in self.credits.items()}
        return replace(self, credits=credits_by_task, is_whole=False)

    def extended(self, more: Mapping[str, Credits], cpu_seconds: float, *, is_whole: bool) -> Cell:
        """With the next examples of some tasks; ``cpu_seconds`` is what these took."""
        credits_by_task = {
            task: np.concatenate([self.credits.get(task, np.empty(0)), more.get(task, np.empty(0))])
            for task in {**self.credits, **more}
        }
        return Cell(self.recipe, credits_by_task, self.cpu_seconds + cpu_seconds, is_whole)


class CellStore:
    """The cells in a folder, one file for each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, recipe: Mapping[str, Any]) -> Cell | None:
        """The cell of a recipe; None if it was not computed, or its file is not a cell."""
        try:
            stored = json.loads(self._path(recipe).read_text())
            credits_by_task = {task: np.array(values, float) for task, values in stored["credits"].items()}
            is_whole = bool(stored.get("is_whole", True))
            return Cell(recipe, credits_by_task, float(stored["cpu_seconds"]), is_whole)
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
            **({} if cell.is_whole else {"is_whole": False}),
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
    return digest_of_records(records)


def digest_of_records(records: Iterable[FileRecord]) -> str:
    """That of a folder with these files."""
    records = sorted(records, key=lambda record: Path(record.name))
    listing = json.dumps([[record.name, record.size, record.sha256] for record in records])
    return hashlib.sha256(listing.encode()).hexdigest()
