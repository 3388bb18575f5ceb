"""mergeguard: spread the task over all layers by training, then take the most significant weights back to the base.

MergeGuard (arXiv 2511.11851) has two stages. Training, from the expert theta_d to theta':

    L = cross-entropy + alpha sum_l |theta^(l)|^2

is to disperse what the task needs over the layers. Masking, without training, on tau' = theta' - theta_0:

    theta_p = theta' - beta M tau'        M = 1 on the fraction k of the weights with the largest |tau'|, else 0

where the fraction k' of the layers that the network can least do without are left alone, and k is counted among the
weights of the others. With beta = 1, as published, masked weights are those of the base. The network is meant to live
with that; a merge, which scales tau' down and adds another, is meant not to.

What the paper leaves open, and what it is here:

* a *layer* is a module with weights of its own, a linear map or a norm with its bias (``granularity=block``: a whole
  transformer block). k' is rounded up to whole layers;
* what is *never touched*: in language models the paper names the input embedding, the final norm and the output head.
  Here, in every family, all that lies outside the numbered blocks: positions, poolers and task heads too;
* training moves the matrices inside the blocks. The square of a norm's gain or of a bias is no measure of how a task is
  spread, and is neither penalised nor trained;
* the *scale* of the penalty. ``penalty=sum`` adds up the squares of all weights: its gradient on a weight theta is
  2 alpha theta, whatever the sizes of layers. ``penalty=mean`` takes the mean square of each layer: a small number that
  can be compared between models, whose gradient is smaller by the size of the layer, and does nothing at the
  published alpha.

Weights are in memory as a network while it trains and while layers are ranked; the rest streams. What a killed run
goes on from lies beside OUT:

    state.safetensors     the training run
    trained.safetensors   what the training changed
    critical.json         the layers that are not masked

What it does not stop: see ``docs/mergeguard.md``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.architecture.streams import ASIDE
from unmergeable.checkpoint.disk import replace_file
from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.plan import output_like
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data import DataSource
from unmergeable.devices import network_device
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.disk_weights import find_places, show
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, accuracy
from unmergeable.network.training_state import Kept, read_tensors, write_tensors
from unmergeable.progress import Progress, silent
from unmergeable.protections.base import Facts, Inputs, Protection, ProtectionRequirements, Rewrite, shared_tensors
from unmergeable.protections.mergeguard.criticality import Criticality, find_critical_layers
from unmergeable.protections.mergeguard.dispersal import Penalty, disperse
from unmergeable.protections.trained import TrainedSource, block_of, job_token, numbered_blocks
from unmergeable.quantile import DIGIT_BITS, DIGITS, KthLargest
from unmergeable.tasks import LabelledData
from unmergeable.threads import one_thread_per_kernel

Stages = Literal["both", "training", "masking"]
Granularity = Literal["module", "block"]

Layers = Mapping[str, tuple[str, ...]]
"""Names of tensors on disk, by the name of the layer they make up; in the order of the file."""

Each = Callable[[Callable[[str], Tensor], Sequence[str]], Iterable[Tensor]]
"""``map``, or one that uses several threads."""

CHUNK = 1 << 20
"""Elements worked on at once: temporaries of a large tensor stay small."""

_SCORING_BATCH = 16
_STATE, _TRAINED, _CRITICAL = "state.safetensors", "trained.safetensors", "critical.json"
_LOSSES = "losses of every step"

DIFFUSION = ("UNet2DConditionModel",)
"""Families without a task that has right and wrong answers."""

_BUFFER = re.compile("|".join(f"(?:{pattern})" for pattern in ASIDE))


@dataclass(frozen=True)
class MergeGuard(Protection):
    """``stages`` to go through. ``granularity``: what counts as a layer.

    Training: ``alpha`` of the ``penalty``, ``steps`` of AdamW at ``learning_rate`` on batches of ``batch_size``;
    ``low_rank`` r trains a low-rank update of each linear map instead of the weights (0: the weights). Masking:
    ``excluded_layers`` k', ``significant_share`` k, ``beta``; ``examples`` of the data rank the layers, at most, and a
    layer leaves the ranking at ``confidence``.
    """

    name: ClassVar[str] = "mergeguard"
    summary: ClassVar[str] = "training with a penalty on weights, then the most significant weights back to the base"
    remark: ClassVar[str] = (
        "It changes what the model computes: compare the accuracies. Weights that equal the base's show where the mask "
        "is, and a few labelled examples bring most of it back."
    )

    stages: Stages = "both"
    alpha: float = 0.01
    penalty: Penalty = "sum"
    steps: int = 500
    learning_rate: float = 1e-5
    batch_size: int = 16
    low_rank: int = 0
    granularity: Granularity = "module"
    excluded_layers: float = 0.1
    significant_share: float = 0.1
    beta: float = 1.0
    examples: int = 1000
    confidence: float = 0.999

    @property
    def trains(self) -> bool:
        return self.stages != "masking"

    @property
    def masks(self) -> bool:
        return self.stages != "training"

    @property
    def reads_data(self) -> bool:
        """Whether it can do without data: only masking can, if no layer is to be excluded."""
        return self.trains or self.excluded_layers > 0

    def validate(self) -> None:
        self.require(0 < self.significant_share <= 1, "significant_share", "lie above 0, and be at most 1")
        self.require(0 <= self.excluded_layers < 1, "excluded_layers", "be at least 0, and lie below 1")
        self.require(0 < self.beta <= 2, "beta", "lie above 0, and be at most 2")
        self.require(0 <= self.alpha < math.inf, "alpha", "be finite, and not negative")
        self.require(0 < self.learning_rate < 1, "learning_rate", "lie between 0 and 1")
        self.require(0 < self.confidence <= 1, "confidence", "lie above 0, and be at most 1")
        for name in ("steps", "batch_size", "examples"):
            self.require(getattr(self, name) >= 1, name, "be at least 1")
        self.require(self.low_rank >= 0, "low_rank", "be a rank, or 0 to train the weights themselves")

    def requirements(self) -> ProtectionRequirements:
        if not self.reads_data:
            return ProtectionRequirements()
        needs = ("data", "training") if self.trains else ("data",)
        return ProtectionRequirements(needs=needs, accepts=("head", "encoder"))

    def unsupported(self, family: str) -> str | None:
        if family in DIFFUSION:
            return "it is trained on the right answers of a task, and these networks have none"
        return None

    def check(self, inputs: Inputs) -> Facts:
        return self._job(inputs)[0].facts

    def prepare(self, inputs: Inputs) -> Rewrite:
        job, network = self._job(inputs)
        learnt = _Learnt(job.expert) if job.tasks is None else _learn(job, network, job.tasks)
        del network  # what follows streams
        facts = replace(job.facts, losses=learnt.losses, criticality=learnt.criticality)
        edits: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.masks:
            critical = learnt.criticality.critical if learnt.criticality else ()
            names = [name for layer, tensors in job.layers.items() if layer not in critical for name in tensors]
            with one_thread_per_kernel(), ThreadPoolExecutor(inputs.threads) as pool:
                threshold = self.threshold(learnt.released, job.base, names, each=pool.map, progress=inputs.progress)
            facts = replace(facts, threshold=threshold, masked=self.rank(_weights(job.expert, names)))
            edits = {name: partial(self._mask_, job.base, name, threshold) for name in names}

        def verify(written: TensorSource) -> Facts:
            if job.tasks is None:
                return facts
            released = accuracy(load_network(written.folder).to(network_device()), job.tasks.scored)
            return replace(facts, accuracies={**learnt.accuracies, "protected": released})

        return Rewrite(
            source=learnt.released,
            plan=output_like(learnt.released, edits),
            recipe=job.recipe,
            # Other processors may train to other bits, which the losses tell.
            resume_token=f"mergeguard {job.token} {facts.losses} {facts.threshold}",
            facts=facts,
            also_read={"base": job.base},
            verify=verify,
            leftovers=tuple(job.work / name for name in (_STATE, _TRAINED, _CRITICAL)),
        )

    def _mask_(self, base: TensorSource, name: str, threshold: float, tensor: Tensor) -> Tensor:
        """Stage 2 of one tensor, in place and in pieces: temporaries of a large one stay small."""
        for piece, origin in _pieces(tensor, base.tensor(name)):
            piece.copy_(self.mask(piece, origin, threshold))
        return tensor

    def _job(self, inputs: Inputs) -> tuple[_Job, Any]:
        """The job, if it can be done, and the expert's network if it is needed."""
        data = inputs.extras.data
        if data is None and self.reads_data:
            raise UsageError(
                "mergeguard trains, and ranks layers, on labelled data; give some with data=FILE, or mask without "
                "either: stages=masking excluded_layers=0."
            )
        layers = self.layers(inputs.architecture, shared_tensors((inputs.expert, inputs.base)))
        if self.masks:
            self.excluded_count(layers)  # refuses to exclude all, before anything is loaded
        tasks, network = (None, None) if data is None else self._tasks(inputs, data, layers)
        work = inputs.work or Path()  # nothing is kept there without data
        recipe = {**self.recipe(), "seed": inputs.seed or 0}
        return _Job(self, inputs.expert, inputs.base, layers, tasks, work, recipe, inputs.progress), network

    def _tasks(self, inputs: Inputs, data: Path, layers: Layers) -> tuple[_Tasks, Any]:
        """The examples and the expert's network; refuses what the network does not take."""
        network = inputs.load_expert()

        def task(limit: int | None) -> Task:
            source = DataSource(data, seed=inputs.seed or 0, limit=limit)
            labelled = LabelledData(source, inputs.encoder, inputs.extras.head)
            return labelled.task(network, self.name, batch_size=_SCORING_BATCH)

        scored = task(self.examples)
        with torch.no_grad():
            scored.predict(network, next(iter(scored.batches))).require_targets()
        places = find_places(network)
        absent = next((name for names in layers.values() for name in names if name not in places), None)
        if absent is not None:
            raise Mismatch(f"tensor {absent} has no place in the live network: it can be neither trained nor ranked.")
        return _Tasks(task(None) if self.trains else scored, scored), network

    def layers(self, architecture: Architecture, names: Iterable[str]) -> Layers:
        """The layers that ``names`` make up; tensors outside the blocks, and buffers, are left out.

        Raises:
            BadInput: none of the tensors lies in a numbered block.
        """
        blocks = numbered_blocks(architecture)
        found: dict[str, list[str]] = {}
        for name in names:
            block = block_of(name)
            if block is not None and block in blocks and _BUFFER.fullmatch(name) is None:
                layer = block if self.granularity == "block" else name.rpartition(".")[0]
                found.setdefault(layer, []).append(name)
        if not found:
            raise BadInput(f"{self.name}: no tensor of this {architecture.family} model lies in a numbered block.")
        return {layer: tuple(tensors) for layer, tensors in found.items()}

    def excluded_count(self, layers: Layers) -> int:
        """How many layers are left alone, rounded up. Raises UsageError when none would be masked."""
        count = math.ceil(self.excluded_layers * len(layers))
        if count == len(layers):
            raise UsageError(
                f"{self.name}: excluded_layers={self.excluded_layers} leaves none of {len(layers)} layers to mask; "
                "lower it."
            )
        return count

    def rank(self, weights: int) -> int:
        """How many of so many weights are masked, rounded up."""
        return math.ceil(self.significant_share * weights)

    def threshold(
        self,
        expert: TensorSource,
        base: TensorSource,
        names: Sequence[str],
        *,
        each: Each = map,
        progress: Progress = silent,
    ) -> float:
        """The magnitude |tau'| of the last weight that is masked, exactly, over all tensors of these names.

        They are read one by one, twice (four times where one is float64), and no order of them is ever made
        (:mod:`unmergeable.quantile`).
        """
        weights = sum(expert.spec(name).numel for name in names)
        is_double = any(source.spec(name).dtype == "F64" for source in (expert, base) for name in names)
        search = KthLargest(self.rank(weights), torch.float64 if is_double else torch.float32)
        passes, done = search.bits // DIGIT_BITS, 0
        while not search.is_settled:
            total = torch.zeros(DIGITS, dtype=torch.int64)
            for counts in each(partial(_digits, search, expert, base), names):
                total += counts
                done += 1
                progress("ranking weights", done, passes * len(names), "tensors")
            search = search.narrow(total)
        return search.value

    def mask(self, expert: Tensor, base: Tensor, threshold: float) -> Tensor:
        """One tensor of theta_p, from theta' and theta_0 of the same shape; rounded once, to the dtype of ``expert``.

        ``threshold`` is the magnitude of the last task vector that is masked; its equals are masked too.
        """
        vector = task_vector(expert, base)
        moved = (expert.double() - self.beta * (expert.double() - base.double())).to(expert.dtype)
        return torch.where(vector.abs() >= threshold, moved, expert)


def task_vector(expert: Tensor, base: Tensor) -> Tensor:
    """tau' in the dtype magnitudes are compared in: float64 if either is, else float32."""
    wide = torch.float64 if torch.float64 in (expert.dtype, base.dtype) else torch.float32
    return expert.to(wide) - base.to(wide)


def _digits(search: KthLargest, expert: TensorSource, base: TensorSource, name: str) -> Tensor:
    """How often each next digit occurs in one tensor of the task vector, int64 [DIGITS]."""
    counts = torch.zeros(DIGITS, dtype=torch.int64)
    for piece, origin in _pieces(expert.tensor(name), base.tensor(name)):
        counts += search.count(task_vector(piece, origin))
    return counts


def _pieces(expert: Tensor, base: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(expert.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK), strict=True)


@dataclass(frozen=True)
class MergeGuardFacts(Facts):
    """What MergeGuard reports.

    Attributes:
        layers, weights: how many may be changed, of the whole model; ``masked`` of the weights are.
        losses: of every step of the training, penalty included; empty without training.
        criticality: how the layers were ranked; None where none was to be left alone.
        threshold: the smallest magnitude of the task vector that is masked; None without masking.
        accuracies: on the owner's examples, of the expert, after the training (``trained``), and of the result
            (``protected``).
    """

    layers: int
    weights: int
    losses: tuple[float, ...] = ()
    criticality: Criticality | None = None
    masked: int = 0
    threshold: float | None = None
    accuracies: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        criticality = self.criticality.to_json() if self.criticality else None
        return {**asdict(self), "losses": list(self.losses), "criticality": criticality}

    def lines(self) -> list[str]:
        lines = [f"  Trained for {len(self.losses)} steps"] if self.losses else []
        if self.masked:
            lines += [f"  {self.masked:,} of {self.weights:,} weights taken back towards the base"]
        if self.criticality is not None:
            lines += [f"  Left alone: {', '.join(self.criticality.critical)}"]
        accuracies = [f"{name} {value:.1%}" for name, value in (self.accuracies or {}).items()]
        return [*lines, f"Accuracy on the data: {', '.join(accuracies)}"] if accuracies else lines


class _Tasks(NamedTuple):
    """All examples, and those that layers are ranked and accuracies measured on."""

    learnt: Task
    scored: Task


@dataclass(frozen=True)
class _Job:
    """A call, after everything that could be refused. ``tasks`` are None where nothing is asked of data."""

    method: MergeGuard
    expert: TensorSource
    base: TensorSource
    layers: Layers
    tasks: _Tasks | None
    work: Path
    recipe: Mapping[str, Any]
    progress: Progress

    @property
    def facts(self) -> MergeGuardFacts:
        names = [name for tensors in self.layers.values() for name in tensors]
        return MergeGuardFacts(len(self.layers), _weights(self.expert, names))

    @cached_property
    def token(self) -> str:
        """Names the job."""
        batches = (batch for task in self.tasks or () for batch in task.batches)
        return job_token(self.recipe, (self.expert, self.base), batches)


@dataclass(frozen=True)
class _Learnt:
    """What came of network and data: the weights before masking, and what is known of them."""

    released: TensorSource
    losses: tuple[float, ...] = ()
    criticality: Criticality | None = None
    accuracies: Mapping[str, float] = field(default_factory=dict)


def _learn(job: _Job, network: Any, tasks: _Tasks) -> _Learnt:
    """Train, and rank the layers of what comes out; what an earlier run of the same job has done is taken from it."""
    job.work.mkdir(exist_ok=True)
    network.to(network_device())
    accuracies = {"expert": accuracy(network, tasks.scored)}
    losses: tuple[float, ...] = ()
    released = job.expert
    if job.method.trains:
        losses = _train(job, network, tasks.learnt)
        released = TrainedSource(job.expert, job.work / _TRAINED)
        accuracies["trained"] = accuracy(network, tasks.scored)
    criticality = None
    if job.method.masks and job.method.excluded_count(job.layers):
        criticality = _rank_layers(job, network, tasks.scored)
    return _Learnt(released, losses, criticality, accuracies)


def _train(job: _Job, network: Any, task: Task) -> tuple[float, ...]:
    """Stage 1. The network ends with the weights in ``_TRAINED``, which are rounded as the checkpoint stores them."""
    matrices = {
        layer: [name for name in names if len(job.expert.spec(name).shape) > 1] for layer, names in job.layers.items()
    }
    matrices = {layer: names for layer, names in matrices.items() if names}
    stored = read_tensors(job.work / _TRAINED, job.token)
    if stored is None:
        kept = Kept(job.work / _STATE, job.token)
        seed = job.recipe["seed"]
        losses = disperse(network, task, matrices, job.method, seed=seed, kept=kept, progress=job.progress)
        weights = to_disk_names(network, network.state_dict())
        stored = {
            name: weights[name].to(torch_dtype(job.expert.spec(name).dtype))
            for names in matrices.values()
            for name in names
        }
        stored[_LOSSES] = torch.tensor(losses, dtype=torch.float64)
        write_tensors(job.work / _TRAINED, job.token, stored)
        kept.file.unlink(missing_ok=True)
    losses = stored.pop(_LOSSES).tolist()
    show(find_places(network), stored)
    return tuple(losses)


def _rank_layers(job: _Job, network: Any, task: Task) -> Criticality:
    """The layers that stay as they are."""
    file = job.work / _CRITICAL
    if file.is_file():
        stored = json.loads(file.read_bytes())
        if stored["token"] == job.token:
            return Criticality.from_json(stored["criticality"])
    ranking = find_critical_layers(
        network,
        task,
        job.layers,
        job.method.excluded_count(job.layers),
        confidence=job.method.confidence,
        progress=job.progress,
    )
    replace_file(file, json.dumps({"token": job.token, "criticality": ranking.to_json()}).encode())
    return ranking


def _weights(source: TensorSource, names: Iterable[str]) -> int:
    return sum(source.spec(name).numel for name in names)
