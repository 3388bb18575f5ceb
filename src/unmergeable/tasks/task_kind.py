"""What every kind of task has in common: settings, data, and a credit and a loss for each example.

    settings (one frozen dataclass for each kind) + data  ->  scorer  ->  credits, losses of a network

A credit lies between 0 and 1, and the score of a network is the mean of its credits. A loss is better when lower, and
means what the kind says. Which examples count (the owner's, the attacker's, the judge's) is up to the data source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from unmergeable.data import DataSource, Fields

Scores = npt.NDArray[np.float64]
"""One number for each example, in the order of the data: float64 [examples]."""


@dataclass(frozen=True)
class TaskData:
    """What any kind of task is made from.

    Attributes:
        name: of the task, for messages.
        source: its examples.
        encoder: the folder whose tokenizer or image processor prepares them.
        batch_size: the most examples a network sees at a time.
        head: file of a head (:mod:`unmergeable.tasks.heads`), for the kinds that use one.
    """

    name: str
    source: DataSource
    encoder: Path
    batch_size: int
    head: Path | None = None


class TaskScorer(Protocol):
    """Examples that are ready, and what a network makes of them. Their number and order are the same every time.

    The order is that of the data source: a random one where that has a seed, so that the first are a fair sample.
    """

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def only(self, start: int, stop: int) -> TaskScorer:
        """The same with the examples of these numbers, ``start`` among them and ``stop`` not; at least one."""
        ...

    def credits(self, network: Any) -> Scores:
        """The credit of each example, between 0 and 1. Raises BadInput when the network cannot do this task."""
        ...

    def losses(self, network: Any) -> Scores:
        """The loss of each example; NaN where the kind knows none."""
        ...


class TaskKind(ABC):
    """The settings of one kind of task: a frozen dataclass. Settings named in ``paths`` are files or folders."""

    name: ClassVar[str]
    revision: ClassVar[int] = 0
    """Raised when the credits of a kind come to mean something else: what was kept of it is then scored again."""
    paths: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def scorer(self, data: TaskData, network: Any) -> TaskScorer:
        """Read and prepare the examples for networks like this one.

        Raises:
            BadInput: an example cannot be used (its file and line are named), or there are none.
            UsageError: something is not installed.
        """

    @property
    def fields(self) -> Fields:
        """What the inputs are called in the data, also for who reads them without asking anything of them."""
        return Fields()

    def facts(self) -> Mapping[str, Any]:
        """What a result has to say about how it was scored besides the settings, ready for JSON."""
        return {}
