"""What happens inside a worker: a group of models is merged and scored, and what is read stays in memory.

A worker builds one network from the base. Merged weights are put in its place without a copy
(:mod:`unmergeable.network.disk_weights`), so a merge costs its arithmetic and its forward passes. Only somebody else's
release and a model of another structure (feed-forwards of polynomials) are networks of their own, and scored as they
are; merging refuses what has not the base's structure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from unmergeable import ops
from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.data import DataSource, Part
from unmergeable.devices import network_device
from unmergeable.errors import BadInput
from unmergeable.evaluation.by_part import PARTS, ByPart
from unmergeable.evaluation.cells import Cell, CellStore
from unmergeable.evaluation.meeting import Enough, meet, never
from unmergeable.evaluation.methods import attack_reads, merge_learns, merge_of
from unmergeable.evaluation.plans.entries import MergeEntry, TaskEntry
from unmergeable.evaluation.race import BATCHES
from unmergeable.evaluation.structure import require_base_structure
from unmergeable.merges import AdaMerging, TaskArithmetic, merge_state_dicts
from unmergeable.merges.adamerging import learn_coefficients
from unmergeable.merges.spectral import SpectralMerge
from unmergeable.merges.sweeps import sweep_of
from unmergeable.merges.task_vectors import CoefficientsOf, TaskVectors
from unmergeable.network.disk_weights import swapped
from unmergeable.network.load import load_network
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.network.precision import FULL, Precision, computing_in
from unmergeable.network.tasks import Task
from unmergeable.ops.opened import open_with_architecture
from unmergeable.polynomials.layout import SECTION
from unmergeable.settings import settings_of
from unmergeable.tasks import ChoiceScorer, TaskData, TaskScorer

SPLIT = (0.2, 0.4, 0.4)
"""Of data given as one file: what an attacker may learn from, what it selects on, and what the judge keeps."""


STILL_TIED = 0.02
"""How far an output head may be from its embedding, of its length, to be the same: fitted bases leave less."""

Coefficients = tuple[float, ...]
"""One for each model of a group."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder and the digest of what is in it.

    Attributes:
        is_foreign: whether it was made elsewhere, and is what its own configuration says.
        trusts_code: whether code in the folder may be run.
    """

    path: Path
    digest: str
    is_foreign: bool = False
    trusts_code: bool = False


@dataclass(frozen=True)
class ScoredTask:
    """A task with the digests of its data and head, by those parts that the plan gives."""

    entry: TaskEntry
    digests: Mapping[Part, str]

    @classmethod
    def of(cls, entry: TaskEntry, digests: Mapping[Path, str]) -> ScoredTask:
        """A task whose files have these digests."""
        return cls(entry, {part: _task_digest(entry, digests, part) for part in entry.parts})


@dataclass(frozen=True)
class Group:
    """Checkpoints that become one model by a merge, and the tasks it is scored on.

    Attributes:
        models: the victim, protected and recovered as may be, and those it is merged with. In an audit these are the
            victim and the free-rider's, or the free-rider's alone for attacks without the victim.
        merge: None to score the only model as it is.
        tasks: those of the models, the victim's first.
        search_precision: in which validation examples are scored, and trained on.
    """

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    merge: MergeEntry | None
    tasks: tuple[ScoredTask, ...]
    search_precision: Precision = FULL

    @property
    def alone(self) -> Checkpoint | None:
        """The model, where it is scored as it is and made elsewhere: it then has a network of its own."""
        return self.models[0] if self.merge is None and self.models[0].is_foreign else None

    def recipe(self, coefficients: Coefficients | None, part: Part) -> dict[str, Any]:
        """What the cell with these coefficients depends on."""
        recipe: dict[str, Any] = {
            "models": [model.digest for model in self.models],
            "coefficients": None if coefficients is None else list(coefficients),
            "tasks": [[task.entry.name, task.digests[part], task.entry.size(part)] for task in self.tasks],
            "part": part,
        }
        if part == "validation" and self.search_precision != FULL:
            recipe["precision"] = self.search_precision
        if self.alone is not None:
            recipe["network"] = "its own"
        if self.merge is not None:
            recipe |= {"base": self.base.digest, "merge": [self.merge.method, dict(self.merge.settings)]}
            if self.merge.start:
                recipe["parts"] = list(PARTS)
            if merge_learns(self.merge.method):
                recipe["learns_from"] = [task.digests["train"] for task in self.tasks]
            if self.merge.then is not None:
                then = self.merge.then
                recipe["then"] = [then.method, dict(then.settings), self.tasks[0].digests.get("train")]
        return recipe


@dataclass(frozen=True)
class Outcome:
    """The cells of a group by coefficients; those that were refused are left out.

    ``refusal`` says why the last of these was: a tensor that is missing, a merge that is not finite.
    """

    cells: Mapping[Coefficients | None, Cell]
    refusal: str = ""


def score_points(group: Group, points: Sequence[Coefficients | None], part: Part, folder: Path) -> Outcome:
    """Score a group merged with each of these coefficients; what is in ``folder`` is not computed again.

    Args:
        group: the models, the merge and the tasks.
        points: coefficients, or None for those of the merge itself. The last count where there are more than models.
        part: of the tasks' examples.
        folder: of the cells.

    Raises:
        BadInput: data or checkpoints cannot be read.
        CheckpointError: a cell cannot be written.
    """
    scoring = Scoring(group, part, folder)
    cells = {point: scoring.cell(point) for point in points}
    return Outcome({point: cell for point, cell in cells.items() if cell is not None}, scoring.refusal)


class Scoring:
    """A group at work on a part of the examples; ``refusal`` says why the last point that was refused was.

    Validation examples are met batch by batch, because attacks race on them (:mod:`unmergeable.evaluation.race`).
    """

    def __init__(self, group: Group, part: Part, folder: Path) -> None:
        self._group, self._part, self._store = group, part, CellStore(folder)
        self._batches = BATCHES if part == "validation" else ()
        self.refusal = ""

    def cell(self, point: Coefficients | None, enough: Enough = never) -> Cell | None:
        """The cell of these coefficients, whole unless a part of it is ``enough``; None when it is refused.

        Raises what :func:`score_points` does.
        """
        found = meet(
            self._group.recipe(point, self._part),
            lambda: self._computing_at(point),
            lambda: scorers_of(self._group, self._part),
            self._store,
            batches=self._batches,
            enough=enough,
        )
        if isinstance(found, str):
            self.refusal = found
            return None
        return found

    @contextmanager
    def _computing_at(self, point: Coefficients | None) -> Iterator[Any]:
        precision = self._group.search_precision if self._part == "validation" else FULL
        with self._network_at(point) as network, computing(precision):
            yield network

    @cached_property
    def _network_at(self) -> Callable[[Coefficients | None], AbstractContextManager[Any]]:
        """Made when first needed, and then kept with its buffers."""
        return _networks_of(self._group)


def computing(precision: Precision) -> AbstractContextManager[None]:
    """The precision in which a worker's networks compute, for as long as the context lasts."""
    return computing_in(precision, network_device())


def _networks_of(group: Group) -> Callable[[Coefficients | None], AbstractContextManager[Any]]:
    """Gives the network with some coefficients, for as long as the context lasts."""
    if group.merge is None:
        return lambda point: _alone(group.base.path, group.models[0])
    weights_at = weights_of(group)

    def merged(point: Coefficients | None) -> AbstractContextManager[Any]:
        for model in group.models:
            if model.is_foreign:
                require_base_structure(group.base.path, model.path)
        return swapped(network_of(group.base.path), weights_at(point))

    return merged


def _alone(base: Path, checkpoint: Checkpoint) -> AbstractContextManager[Any]:
    """The network of a checkpoint that is not merged; of another structure than the base's, as may be."""
    if checkpoint.is_foreign or _is_polynomial(checkpoint):
        return nullcontext(_own_network(checkpoint))
    return swapped(network_of(base), state_of(checkpoint))


def network_to_train(group: Group) -> Any:
    """The network whose weights a training changes: the base's, or a release's own where its structure is its own."""
    is_own = group.merge is None and _is_polynomial(group.models[0])
    return _own_network(group.models[0]) if is_own else network_of(group.base.path)


def _is_polynomial(checkpoint: Checkpoint) -> bool:
    return SECTION in open_checkpoint(checkpoint.path).config


def weights_of(group: Group) -> Callable[[Coefficients | None], Mapping[str, Tensor]]:
    """Gives the weights with some coefficients; they are valid until it is asked for the next ones."""
    if group.merge is None:
        state = state_of(group.models[0])
        return lambda point: state
    method = merge_of(group.merge.method, group.merge.settings)
    count = len(group.models)
    if group.merge.then is not None:
        return lambda point: _attacked(group, _each(point, count))
    if isinstance(method, AdaMerging):
        return lambda point: _learnt(group, method)
    sweep = sweep_of(method, _vectors(group.base, group.models)) if isinstance(method, SpectralMerge) else None
    if sweep is not None:
        return lambda point: sweep(method.resolve(_each(point, count)))
    if not isinstance(method, TaskArithmetic):
        base, experts = state_of(group.base), [_stored_as_base(group.base, model) for model in group.models]
        return lambda point: merge_state_dicts(base, experts, method=method, coefficients=_each(point, count))
    buffer: dict[str, Tensor] = {}

    def added(point: Coefficients | None) -> Mapping[str, Tensor]:
        coefficients: Sequence[float] | CoefficientsOf
        if point is not None and group.merge is not None and group.merge.start:
            by_part = _parts_of(group.base)
            coefficients = partial(_of_part, by_part, point)
        else:
            coefficients = method.resolve(_each(point, count))
        merged = _vectors(group.base, group.models).merged(coefficients, into=buffer or None)
        buffer.update(merged)
        return merged

    return added


def _of_part(by_part: ByPart, point: Coefficients, name: str) -> Sequence[float]:
    return by_part.coefficients(name, point)


@lru_cache(maxsize=1)
def _parts_of(base: Checkpoint) -> ByPart:
    return ByPart.of(open_with_architecture(base.path)[1])


def _each(point: Coefficients | None, count: int) -> list[float | None]:
    """A coefficient of each of ``count`` experts."""
    return [None] * count if point is None else list(point[-count:])


def _learnt(group: Group, method: AdaMerging) -> Mapping[str, Tensor]:
    """The merge whose coefficients unlabelled examples of all tasks decide."""
    vectors = _vectors(group.base, group.models)
    base = group.base.path
    tasks = [task_of(task.entry, task.digests["train"], "train", base, limit=method.examples) for task in group.tasks]
    learnt = learn_coefficients(network_of(base), vectors, tasks, method)
    used = vectors if method.task_vectors == "plain" else vectors.elected(method.density)
    return used.merged(learnt.coefficients.__getitem__)


def _attacked(group: Group, coefficients: Sequence[float | None]) -> Mapping[str, Tensor]:
    """The merge after an attack on it, which may read the release and examples of the victim's task."""
    merge, task = group.merge, group.tasks[0].entry
    assert merge is not None
    assert merge.then is not None
    reads = attack_reads(merge.then.method)
    paths = [model.path for model in group.models]
    inputs: dict[str, Any] = {"sources": paths[:1] if "sources" in reads else []}
    if "data" in reads:
        inputs |= {"data": task.data("train"), "head": task.head, "encoder": task.encoder}
    with TemporaryDirectory() as place:
        merged, attacked = Path(place, "merged"), Path(place, "attacked")
        experts = list(zip(paths, coefficients, strict=True))
        settings = dict(merge.settings)
        ops.merge(base=group.base.path, experts=experts, method=merge.method, settings=settings, out=merged)
        settings = dict(merge.then.settings)
        ops.recover(merged, base=group.base.path, method=merge.then.method, settings=settings, out=attacked, **inputs)
        source = open_checkpoint(attacked)
        return {name: source.tensor(name).clone() for name in source.names}


# What a worker keeps. Digests are among the arguments so that a changed file is read again.


@lru_cache(maxsize=1)
def network_of(base: Path) -> Any:
    """The network that weights are put into, on a GPU where there is one."""
    torch.set_num_threads(1)  # a worker has one processor
    return load_network(base).to(network_device())


@lru_cache(maxsize=1)
def _own_network(checkpoint: Checkpoint) -> Any:
    """The network that a checkpoint's own configuration says."""
    if _is_polynomial(checkpoint):
        return load_polynomial_network(checkpoint.path).to(network_device())
    return load_network(checkpoint.path, trust_remote_code=checkpoint.trusts_code).to(network_device())


@lru_cache(maxsize=6)
def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors by their names on disk; nobody may change them."""
    source = open_checkpoint(checkpoint.path)
    return {name: source.tensor(name) for name in source.names}


def _stored_as_base(base: Checkpoint, model: Checkpoint) -> Mapping[str, Tensor]:
    """The tensors of a model in the base's precision, as whoever merges them converts them first.

    An output head that is stored apart and is the embedding, up to rounding, goes where the base has it: nowhere.
    """
    ours, theirs = state_of(base), _tied_as(state_of(base), state_of(model))
    is_other = {
        name: tensor.is_floating_point() and ours[name].is_floating_point() and tensor.dtype != ours[name].dtype
        for name, tensor in theirs.items()
        if name in ours
    }
    if not any(is_other.values()):
        return theirs
    return {name: tensor.to(ours[name].dtype) if is_other.get(name) else tensor for name, tensor in theirs.items()}


def _tied_as(base: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    head = model.get(OUTPUT_HEAD)
    if head is None or OUTPUT_HEAD in base:
        return model
    alike = (
        name
        for name, tensor in model.items()
        if name in base and name != OUTPUT_HEAD and tensor.shape == head.shape
        if float((head - tensor).norm()) <= STILL_TIED * float(tensor.norm())
    )
    return model if next(alike, None) is None else {n: t for n, t in model.items() if n != OUTPUT_HEAD}


@lru_cache(maxsize=1)
def _vectors(base: Checkpoint, experts: tuple[Checkpoint, ...]) -> TaskVectors:
    return TaskVectors.between(state_of(base), [_stored_as_base(base, expert) for expert in experts])


def scorers_of(group: Group, part: Part) -> dict[str, TaskScorer]:
    """Those of all tasks, by their names."""
    return {task.entry.name: task_scorer(task, part, group.base.path, group.alone) for task in group.tasks}


def task_scorer(task: ScoredTask, part: Part, base: Path, own: Checkpoint | None = None) -> TaskScorer:
    """The examples of a task that are scored, for the base's network or for a model with one of its own."""
    return scorer_of(task.entry, task.digests[part], part, base, own=own)


def network_for(base: Path, own: Checkpoint | None) -> Any:
    """The base's network, or that of a model with one of its own."""
    return network_of(base) if own is None else _own_network(own)


@lru_cache(maxsize=12)
def scorer_of(
    entry: TaskEntry, digest: str, part: Part, base: Path, limit: int | None = None, own: Checkpoint | None = None
) -> TaskScorer:
    """The examples of a part for the base's network.

    Args:
        entry: the task.
        digest: of what its credits depend on.
        part: of its examples.
        base: the network that is scored.
        limit: the most examples; None for as many as the plan says (not of ``train``).
        own: a model with a network of its own, which takes the place of the base's.
    """
    limit = entry.size(part) if limit is None else limit
    source = DataSource(entry.data(part), part=part if entry.is_split else None, fractions=SPLIT, seed=0, limit=limit)
    data = TaskData(entry.name, source, entry.encoder, entry.batch_size, entry.head)
    return entry.kind.scorer(data, network_for(base, own))


def task_of(entry: TaskEntry, digest: str, part: Part, base: Path, limit: int | None = None) -> Task:
    """The same examples as batches of choices, for what needs more than scores: gradients.

    Raises:
        BadInput: as :func:`scorer_of` does; or a kind of task whose answers are no choices among classes.
    """
    scorer = scorer_of(entry, digest, part, base, limit)
    if not isinstance(scorer, ChoiceScorer):
        raise BadInput(f"{entry.name}: {entry.kind.name} has no classes to choose among, which this analysis needs.")
    return scorer.task


def _task_digest(entry: TaskEntry, digests: Mapping[Path, str], part: Part) -> str:
    """What the credits of a task depend on besides the weights."""
    data = digests[entry.data(part)]
    head = None if entry.head is None else digests[entry.head]
    settings = {name: value for name, value in settings_of(entry.kind).items() if name not in entry.kind.paths}
    kind: list[Any] = [entry.kind.name, settings, [digests[path] for path in entry.paths_of_kind]]
    kind += [entry.kind.revision] if entry.kind.revision else []
    return json.dumps([data, head, kind, entry.is_split, SPLIT])
