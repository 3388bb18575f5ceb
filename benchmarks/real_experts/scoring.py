"""One way of scoring for every table: weights go in, which test examples come out right comes out.

Two models are asked the same examples, so their accuracies are compared in pairs: the standard error is that of the
mean of the differences, which is smaller than that of either accuracy. A difference below two standard errors is not
called one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from benchmarks.real_experts.experts import Part, Study
from safetensors.torch import load_file
from torch import Tensor

from unmergeable.merges import Linear, Ties, merge_state_dicts
from unmergeable.merges.task_vectors import TaskVectors, score_merges
from unmergeable.network.disk_weights import swapped
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task
from unmergeable.tasks import example_credits

State = Mapping[str, Tensor]
Right = npt.NDArray[np.bool_]
"""For each example of a part whether the answer is right."""

PUBLISHED_COEFFICIENT = 0.3
GRID = (0.3, 0.5, 0.7, 0.9)
"""Scaling coefficients that an attacker with validation examples tries, one for both experts."""


def read_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by their names on disk."""
    return load_file(folder / "model.safetensors")


@dataclass(frozen=True)
class Difference:
    """``points``: accuracy of one model less that of another, in per cent; ``standard_error`` in the same."""

    points: float
    standard_error: float

    @classmethod
    def between(cls, first: Right, second: Right) -> Difference:
        """Of the second model from the first, on the same examples."""
        gaps = 100.0 * (second.astype(float) - first.astype(float))
        return cls(float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(len(gaps)))

    @property
    def is_real(self) -> bool:
        """Beyond two standard errors. Without a single difference there is none, whatever the error."""
        return abs(self.points) > 2 * self.standard_error

    def to_json(self) -> dict[str, Any]:
        return {"points": round(self.points, 2), "standard_error": round(self.standard_error, 2), "real": self.is_real}


class Scorer:
    """The network of a study, into which weights are put, and its tasks, kept in memory."""

    def __init__(self, study: Study, *, limit: int | None = None) -> None:
        """``limit``: the most examples of a part to score; None for all."""
        self.study, self.limit = study, limit
        self.network = load_network(study.base)
        self._tasks: dict[tuple[str, Part], Task] = {}

    @cached_property
    def base(self) -> State:
        return read_state(self.study.base)

    def task(self, name: str, part: Part = "test") -> Task:
        """A task, its examples encoded once."""
        if (name, part) not in self._tasks:
            self._tasks[name, part] = self.study.task(name, part, limit=self.limit)
        return self._tasks[name, part]

    def answers(self, network: Any, tasks: Sequence[str], part: Part = "test") -> dict[str, Right]:
        """What a live network gets right, by task."""
        return {name: example_credits(network, self.task(name, part)) > 0.5 for name in tasks}

    def right(self, weights: State, tasks: Sequence[str], part: Part = "test") -> dict[str, Right]:
        """What weights get right, by task."""
        with swapped(self.network, weights):
            return self.answers(self.network, tasks, part)

    def best_coefficient(self, vectors: TaskVectors, tasks: Sequence[str]) -> float:
        """The scaling coefficient of ``GRID`` with the best mean accuracy on validation examples."""

        def score(network: Any) -> float:
            return float(np.mean([found.mean() for found in self.answers(network, tasks, "validation").values()]))

        found = score_merges(self.network, vectors, [(value,) * len(vectors.vectors) for value in GRID], score)
        return GRID[int(np.argmax(found))]

    def merges(self, first: State, second: State, tasks: Sequence[str]) -> dict[str, Merged]:
        """Two experts merged in every way of the tables.

        Raises:
            Mismatch: their tensors differ in name, shape or dtype from the base's.
        """
        vectors = TaskVectors.between(self.base, [first, second])
        best = self.best_coefficient(vectors, tasks)
        found = {}
        for name, weights, coefficient in (
            ("linear", merge_state_dicts(self.base, [first, second], method=Linear()), None),
            ("task_arithmetic", vectors.merged((PUBLISHED_COEFFICIENT,) * 2), PUBLISHED_COEFFICIENT),
            ("task_arithmetic, best", vectors.merged((best, best)), best),
            ("ties", merge_state_dicts(self.base, [first, second], method=Ties()), None),
        ):
            found[name] = Merged(self.right(weights, tasks), coefficient)
        return found


@dataclass(frozen=True)
class Merged:
    """What a merge gets right by task, and the scaling coefficient it was made with, if it has one."""

    right: Mapping[str, Right]
    coefficient: float | None
