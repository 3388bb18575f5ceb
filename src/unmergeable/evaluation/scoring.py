"""What happens inside a worker: networks, state dicts and data stay in memory, weights change, credits come out.

A worker builds one network from the base. Merged weights are put in its place without a copy
(:mod:`unmergeable.network.disk_weights`), so a merge costs its arithmetic and its forward passes. Only a model of
another structure (feed-forwards of polynomials) is a network of its own; it is scored as it is, and merging refuses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch import Tensor

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.data import DataSource
from unmergeable.errors import BadInput, CheckpointError, UsageError
from unmergeable.evaluation.cells import Cell, CellStore
from unmergeable.evaluation.plan import Coefficients, MethodEntry, Part, TaskEntry
from unmergeable.evaluation.search import Point, coarse_points, next_points
from unmergeable.merges import MERGES, AdaMerging, TaskArithmetic, merge_state_dicts
from unmergeable.merges.adamerging import learn_coefficients
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.network.disk_weights import swapped
from unmergeable.network.load import load_network
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.network.tasks import Task
from unmergeable.polynomials.layout import SECTION
from unmergeable.settings import configure, settings_of
from unmergeable.tasks import ChoiceScorer, TaskData, TaskScorer

SPLIT = (0.2, 0.4, 0.4)
"""Of data given as one file: what an attacker may learn from, what it selects on, and what the judge keeps."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder and the digest of what is in it."""

    path: Path
    digest: str


@dataclass(frozen=True)
class ScoredTask:
    """A task with the digests of its data and head, by part; without ``train`` where the plan gives none."""

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
        learnt = [task.digests["train"] for task in self.tasks] if _learns(self.merge) else None
        return {
            "models": models,
            "merge": merge,
            "learns_from": learnt,
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
        tasks = scorers_of(sweep, part)
        network_at = _networks_of(sweep)
        for point in missing:
            found = score_network(sweep.recipe(point, part), partial(network_at, point), tasks)
            if isinstance(found, str):
                refusal = found
                continue
            store.put(found)
            cells[point] = found
    return Outcome({point: cell for point, cell in cells.items() if cell is not None}, refusal)


def score_network(
    recipe: Mapping[str, Any], network: Callable[[], AbstractContextManager[Any]], tasks: Mapping[str, TaskScorer]
) -> Cell | str:
    """The cell of a recipe, whose network lives as long as its context; or why there is no such network."""
    began = thread_time()
    with ExitStack() as stack:
        try:
            live = stack.enter_context(network())
        except CheckpointError:
            raise
        except BadInput as error:
            return str(error)
        found = {name: scorer.credits(live) for name, scorer in tasks.items()}
    return Cell(recipe, found, thread_time() - began)


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


def _networks_of(sweep: Sweep) -> Callable[[Point | None], AbstractContextManager[Any]]:
    """Gives the network at a point, for as long as the context lasts."""
    if sweep.merge is None:
        return lambda point: alone(sweep.base.path, sweep.victim or sweep.rider)
    weights_at = weights_of(sweep)
    return lambda point: swapped(network_of(sweep.base.path), weights_at(point))


def alone(base: Path, checkpoint: Checkpoint) -> AbstractContextManager[Any]:
    """The network of a checkpoint that is not merged; of another structure than the base's, as may be."""
    if SECTION in open_checkpoint(checkpoint.path).config:
        return nullcontext(_polynomial_network(checkpoint))
    return swapped(network_of(base), state_of(checkpoint))


def weights_of(sweep: Sweep) -> Callable[[Point | None], Mapping[str, Tensor]]:
    """Gives the weights at a point; they are valid until it is asked for the next ones."""
    if sweep.merge is None:
        state = state_of(sweep.victim or sweep.rider)
        return lambda point: state
    base, rider = (state_of(checkpoint) for checkpoint in (sweep.base, sweep.rider))
    experts = [rider] if sweep.victim is None else [state_of(sweep.victim), rider]
    method = configure(MERGES[sweep.merge.method], sweep.merge.settings)
    if isinstance(method, AdaMerging):
        return lambda point: _learnt(sweep, method)
    if not isinstance(method, TaskArithmetic):
        return lambda point: merge_state_dicts(base, experts, method=method, coefficients=_of(point, experts))
    buffer: dict[str, Tensor] = {}

    def added(point: Point | None) -> Mapping[str, Tensor]:
        vectors = _vectors(sweep.base, sweep.victim, sweep.rider)
        merged = vectors.merged(method.resolve(_of(point, experts) or [None] * len(experts)), into=buffer or None)
        buffer.update(merged)
        return merged

    return added


def _learnt(sweep: Sweep, method: AdaMerging) -> Mapping[str, Tensor]:
    """The merge whose coefficients unlabelled examples of both tasks decide."""
    vectors = _vectors(sweep.base, sweep.victim, sweep.rider)
    base = sweep.base.path
    tasks = [task_of(task.entry, task.digests["train"], "train", base, limit=method.examples) for task in sweep.tasks]
    found = learn_coefficients(network_of(base), vectors, tasks, method)
    used = vectors if method.task_vectors == "plain" else vectors.elected(method.density)
    return used.merged(found.coefficients.__getitem__)


def _of(point: Point | None, experts: Sequence[object]) -> list[float | None] | None:
    """The coefficients of the experts at a point; without a victim, the free-rider's alone."""
    if point is None:
        return None
    defended, rider = point
    return [rider] if len(experts) == 1 else [defended, rider]


def _learns(merge: MethodEntry | None) -> bool:
    """Whether a merge finds its coefficients by itself, from data."""
    return merge is not None and MERGES[merge.method]().needs_data


def _takes_coefficients(merge: MethodEntry) -> bool:
    if _learns(merge):
        return False
    method = configure(MERGES[merge.method], merge.settings)
    try:
        method.resolve([0.5, 0.5])
    except UsageError:
        return False
    return True


# What a worker keeps. Digests are among the arguments so that a changed file is read again.


@lru_cache(maxsize=1)
def network_of(base: Path) -> Any:
    """The network that weights are put into, on a GPU where there is one."""
    torch.set_num_threads(1)  # a worker has one processor
    return load_network(base).to(_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)
def _polynomial_network(checkpoint: Checkpoint) -> Any:
    return load_polynomial_network(checkpoint.path).to(_device())


@lru_cache(maxsize=6)
def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors by their names on disk; nobody may change them."""
    source = open_checkpoint(checkpoint.path)
    return {name: source.tensor(name) for name in source.names}


@lru_cache(maxsize=1)
def _vectors(base: Checkpoint, victim: Checkpoint | None, rider: Checkpoint) -> TaskVectors:
    experts = [rider] if victim is None else [victim, rider]
    return TaskVectors.between(state_of(base), [state_of(expert) for expert in experts])


def scorers_of(sweep: Sweep, part: Part) -> dict[str, TaskScorer]:
    """Those of both tasks, by their names."""
    return {task.entry.name: scorer_of(task.entry, task.digests[part], part, sweep.base.path) for task in sweep.tasks}


@lru_cache(maxsize=12)
def scorer_of(entry: TaskEntry, digest: str, part: Part, base: Path, limit: int | None = None) -> TaskScorer:
    """The examples of a part; ``limit`` is the most of them, None for as many as the plan says (not of ``train``)."""
    if limit is None:
        assert part != "train"
        limit = entry.size(part)
    source = DataSource(entry.data(part), part=part if entry.is_split else None, fractions=SPLIT, seed=0, limit=limit)
    data = TaskData(entry.name, source, entry.encoder, entry.batch_size, entry.head)
    return entry.kind.scorer(data, network_of(base))


def task_of(entry: TaskEntry, digest: str, part: Part, base: Path, limit: int | None = None) -> Task:
    """The same examples as batches of choices, for what needs more than scores: gradients.

    Raises:
        BadInput: as :func:`scorer_of` does; or a kind of task whose answers are no choices among classes.
    """
    scorer = scorer_of(entry, digest, part, base, limit)
    if not isinstance(scorer, ChoiceScorer):
        raise BadInput(f"{entry.name}: {entry.kind.name} has no classes to choose among, which this analysis needs.")
    return scorer.task


def task_digest(entry: TaskEntry, digests: Mapping[Path, str], part: Part) -> str:
    """What the credits of a task depend on besides the weights."""
    data = digests[entry.data(part)]
    head = None if entry.head is None else digests[entry.head]
    settings = {name: value for name, value in settings_of(entry.kind).items() if name not in entry.kind.paths}
    kind = [entry.kind.name, settings, [digests[path] for path in entry.paths_of_kind]]
    return json.dumps([data, head, kind, entry.is_split, SPLIT])
