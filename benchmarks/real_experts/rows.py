"""Rows of tables on disk: each a small JSON file named after everything that it depends on.

A killed run finds its rows again. What a row depends on is the study's base, experts, data and heads, and its own
recipe. The code is not among it: after a change of a method, delete the folder of rows, or those that it made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.real_experts.experts import PARTS, Study
from benchmarks.real_experts.scoring import Right

from unmergeable.checkpoint.disk import replace_file
from unmergeable.evaluation.cells import digest_of, identity

Row = dict[str, Any]


class Rows:
    """The rows of one table of a study."""

    def __init__(self, study: Study, table: str, *, limit: int | None) -> None:
        self._study, self._limit = study, limit
        self._folder = study.folder / table
        self._folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def _inputs(self) -> Mapping[str, str]:
        study = self._study
        files = [study.base, *(study.expert(task) for task in study.tasks), *(study.head(task) for task in study.tasks)]
        files += [study.data(task, part) for task in study.tasks for part in PARTS]
        return {file.name: digest_of(file) for file in files}

    def get(self, recipe: Mapping[str, Any], compute: Callable[[], Row], *, label: str) -> Row:
        """The row of a recipe, computed if it is not there."""
        if not self.has(recipe):
            self.put(recipe, compute(), label=label)
        found: Row = json.loads(self._path(recipe).read_text())["row"]
        return found

    def put(self, recipe: Mapping[str, Any], row: Row, *, label: str) -> None:
        """Keep a row, and say so."""
        replace_file(self._path(recipe), json.dumps({"recipe": recipe, "row": row}).encode())
        print(f"{self._study.name}: {label}", flush=True)

    def has(self, recipe: Mapping[str, Any]) -> bool:
        """Whether the row of a recipe was computed."""
        return self._path(recipe).exists()

    def _path(self, recipe: Mapping[str, Any]) -> Path:
        return self._folder / f"{identity({'inputs': self._inputs, 'limit': self._limit, **recipe})}.json"


def to_text(right: Mapping[str, Right]) -> dict[str, str]:
    """Answers by task as strings of 0 and 1."""
    return {task: "".join("1" if one else "0" for one in found) for task, found in right.items()}


def from_text(text: str) -> Right:
    """The inverse of :func:`to_text` for one task."""
    right: Right = np.frombuffer(text.encode(), np.uint8) == ord("1")
    return right


def accuracy(text: str) -> float:
    """The share of right answers, in per cent."""
    return round(100 * float(from_text(text).mean()), 1)
