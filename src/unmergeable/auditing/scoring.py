"""What happens inside a worker: networks, state dicts and data stay in memory, weights change, credits come out.

A worker builds one network from the base and never another. Merged weights are put in its place without a copy
(:mod:`unmergeable.network.disk_weights`), so a merge costs its arithmetic and its forward passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import thread_time
from typing import Any, Literal

import torch
from torch import Tensor

from unmergeable.auditing.cells import Cell, CellStore
from unmergeable.auditing.plan import Coefficients, MethodEntry, TaskEntry
from unmergeable.auditing.search import Point, coarse_points, next_points
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.data import DataSource
from unmergeable.errors import BadInput, CheckpointError, UsageError
from unmergeable.merges import MERGES, TaskArithmetic, merge_state_dicts
from unmergeable.network.disk_weights import swapped
from unmergeable.network.load import load_network
from unmergeable.network.task_vectors import TaskVectors
from unmergeable.network.tasks import Task
from unmergeable.settings import configure
from unmergeable.tasks import LabelledData, example_credits

Part = Literal["validation", "test"]

SPLIT = (0.0, 0.5, 0.5)
"""Of data given as one file: nothing is trained here, so half is the attacker's and half the judge's."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder and the digest of what is in it."""

    path: Path
    digest: str


@dataclass(frozen=True)
class ScoredTask:
    """A task with the digest of its data and head."""

    entry: TaskEntry
    digests: Mapping[Part, str]


@dataclass(frozen=True)
class Sweep:
    """The merges of two checkpoints by one method, over the plane of their coefficients.

    Attributes:
        victim: the defended expert, protected and recovered as may be; None for attacks that leave it alone.
        merge: None to score the victim (or, without one, the rider) as it is.
        tasks: the defended task and the free-rider's.
    """

    base: Checkpoint
    victim: Checkpoint | None
    rider: Checkpoint
    merge: MethodEntry | None
    tasks: tuple[ScoredTask, ScoredTask]

    def recipe(self, point: Point | None, part: Part) -> dict[str, Any]:
        """What the cell at a point depends on."""
        merge = None if self.merge is None else [self.merge.method, dict(self.merge.settings)]
        models = [checkpoint and checkpoint.digest for checkpoint in (self.base, self.victim, self.rider)]
        if self.merge is None:
            models = [(self.victim or self.rider).digest]
        return {
            "models": models,
            "merge": merge,
            "coefficients": None if point is None else list(point),
            "tasks": [[task.entry.name, task.digests[part], task.entry.sizes] for task in self.tasks],
            "part": part,
        }


@dataclass(frozen=True)
class Outcome:
    """The cells of a sweep by point (None where the merge has no coefficients); points that were refused are left out.

    ``refusal`` says why the last of these was: a tensor that is missing, a merge that is not finite.
    """

    cells: Mapping[Point | None, Cell]
    refusal: str = ""


def score_points(sweep: Sweep, points: Sequence[Point | None], part: Part, folder: Path) -> Outcome:
    """Score given points of a sweep; those whose cell is in ``folder`` are not computed again.

    Raises:
        BadInput: data or checkpoints cannot be read.
        CheckpointError: a cell cannot be written.
    """
    store = CellStore(folder)
    cells = {point: store.get(sweep.recipe(point, part)) for point in points}
    missing = [point for point, cell in cells.items() if cell is None]
    refusal = ""
    if missing:
        network = _network(sweep.base.path)
        tasks = [_task(task.entry, task.digests[part], part) for task in sweep.tasks]
        weights_at = _weights_of(sweep)
        for point in missing:
            began = thread_time()
            with ExitStack() as stack:
                try:
                    stack.enter_context(swapped(network, weights_at(point)))
                except CheckpointError:
                    raise
                except BadInput as error:
                    refusal = str(error)
                    continue
                found = {task.name: example_credits(network, task) for task in tasks}
            cell = Cell(sweep.recipe(point, part), found, thread_time() - began)
            store.put(cell)
            cells[point] = cell
    return Outcome({point: cell for point, cell in cells.items() if cell is not None}, refusal)


def search(sweep: Sweep, coefficients: Coefficients, kept: float, folder: Path) -> Outcome:
    """Score the coarse grid on validation examples, and refine it where the best attacks are.

    Args:
        coefficients: the grid and how many points refine it.
        kept: the free-rider's score that an attack must keep to count.
        folder: of the cells.

    Raises:
        BadInput, CheckpointError: as :func:`score_points` does.
    """
    if sweep.merge is None or not _takes_coefficients(sweep.merge):
        return score_points(sweep, [None], "validation", folder)
    outcome = score_points(sweep, coarse_points(_grid(sweep, coefficients)), "validation", folder)
    defended, rider = (task.entry.name for task in sweep.tasks)
    left = coefficients.refinements
    while left > 0:
        means = {
            point: (float(cell.credits[defended].mean()), float(cell.credits[rider].mean()))
            for point, cell in outcome.cells.items()
            if point is not None
        }
        points = next_points(means, kept, left) if means else []
        if not points:
            break
        more = score_points(sweep, points, "validation", folder)
        outcome = Outcome({**outcome.cells, **more.cells}, more.refusal or outcome.refusal)
        left -= len(points)
    return outcome


def _grid(sweep: Sweep, coefficients: Coefficients) -> Coefficients:
    """Without a victim only the free-rider's coefficient counts, and its own model is among the points."""
    if sweep.victim is not None:
        return coefficients
    return replace(coefficients, defended=(0.0,), rider=tuple(sorted({*coefficients.rider, 1.0})))


def _weights_of(sweep: Sweep) -> Callable[[Point | None], Mapping[str, Tensor]]:
    """Gives the weights at a point; they are valid until it is asked for the next ones."""
    if sweep.merge is None:
        alone = _state(sweep.victim or sweep.rider)
        return lambda point: alone
    base, rider = (_state(checkpoint) for checkpoint in (sweep.base, sweep.rider))
    experts = [rider] if sweep.victim is None else [_state(sweep.victim), rider]
    method = configure(MERGES[sweep.merge.method], sweep.merge.settings)
    if not isinstance(method, TaskArithmetic):
        return lambda point: merge_state_dicts(base, experts, _of(point, experts), method)
    buffer: dict[str, Tensor] = {}

    def added(point: Point | None) -> Mapping[str, Tensor]:
        vectors = _vectors(sweep.base, sweep.victim, sweep.rider)
        merged = vectors.merged(method.resolve(_of(point, experts) or [None] * len(experts)), into=buffer or None)
        buffer.update(merged)
        return merged

    return added


def _of(point: Point | None, experts: Sequence[object]) -> list[float | None] | None:
    """The coefficients of the experts at a point; without a victim, the free-rider's alone."""
    if point is None:
        return None
    defended, rider = point
    return [rider] if len(experts) == 1 else [defended, rider]


def _takes_coefficients(merge: MethodEntry) -> bool:
    method = configure(MERGES[merge.method], merge.settings)
    try:
        method.resolve([0.5, 0.5])
    except UsageError:
        return False
    return True


# What a worker keeps. Digests are among the arguments so that a changed file is read again.


@lru_cache(maxsize=1)
def _network(base: Path) -> Any:
    torch.set_num_threads(1)  # a worker has one processor
    return load_network(base)


@lru_cache(maxsize=6)
def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    source = open_checkpoint(checkpoint.path)
    return {name: source.tensor(name) for name in source.names}


@lru_cache(maxsize=1)
def _vectors(base: Checkpoint, victim: Checkpoint | None, rider: Checkpoint) -> TaskVectors:
    experts = [rider] if victim is None else [victim, rider]
    return TaskVectors.between(_state(base), [_state(expert) for expert in experts])


@lru_cache(maxsize=8)
def _task(entry: TaskEntry, digest: str, part: Part) -> Task:
    is_split = entry.validation == entry.test
    size = entry.sizes[0 if part == "validation" else 1]
    source = DataSource(
        entry.validation if part == "validation" else entry.test,
        part=part if is_split else None,
        fractions=SPLIT,
        seed=0,
        limit=size,
    )
    data = LabelledData(source, entry.encoder, entry.head)
    return data.task(_network(entry.encoder), entry.name, batch_size=entry.batch_size)


def task_digest(entry: TaskEntry, digests: Mapping[Path, str], part: Part) -> str:
    """What the credits of a task depend on besides the weights."""
    data = digests[entry.validation if part == "validation" else entry.test]
    head = None if entry.head is None else digests[entry.head]
    return json.dumps([data, head, entry.validation == entry.test, SPLIT])
