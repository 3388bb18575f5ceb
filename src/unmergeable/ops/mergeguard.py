"""Protect by training and masking weights: both stages of MergeGuard, from files to a file.

    OUT.training/state.safetensors     the training run, to go on from after a kill
    OUT.training/trained.safetensors   what the training changed
    OUT.training/critical.json         the layers that are not masked

The folder is there until OUT is. Weights are in memory as a network while it trains and while layers are ranked; the
rest streams.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from unmergeable.checkpoint.disk import replace_file
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.index import is_adapter
from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.checkpoint.source import DerivedSource, TensorSource, tensor_bytes
from unmergeable.data import DataSource
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.criticality import Criticality, find_critical_layers
from unmergeable.network.disk_weights import find_places, show, to_disk_names
from unmergeable.network.dispersal import disperse
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, accuracy
from unmergeable.network.training_state import Kept, read_tensors, write_tensors
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.ops.workers import one_thread_per_kernel, worker_threads
from unmergeable.progress import Progress, silent
from unmergeable.protections import MergeGuard
from unmergeable.protections.mergeguard import CHUNK, Layers
from unmergeable.settings import configure, settings_of
from unmergeable.tasks import LabelledData

NOTE = (
    "Makes off-the-shelf merges worse, and changes what the model computes: compare the accuracies. Does not stop "
    "somebody who knows the method: weights that equal the base's show where the mask is, and a few labelled examples "
    "bring most of it back."
)

_SCORING_BATCH = 16
_STATE, _TRAINED, _CRITICAL = "state.safetensors", "trained.safetensors", "critical.json"
_LOSSES = "losses of every step"


@dataclass(frozen=True)
class MergeGuardResult:
    """What was (or, in a dry run, would be) written.

    Attributes:
        losses: of every step of the training, penalty included; empty without training.
        criticality: how the layers were ranked; None where none was to be left alone.
        layers, weights: how many may be changed, of the whole model; ``masked`` of the weights are.
        threshold: the smallest magnitude of the task vector that is masked; None without masking.
        accuracies: on the owner's examples, of the expert, after the training (``trained``), and of the result
            (``protected``).
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    architecture: str
    layers: int
    weights: int
    is_dry_run: bool
    losses: tuple[float, ...] = ()
    criticality: Criticality | None = None
    masked: int = 0
    threshold: float | None = None
    accuracies: Mapping[str, float] | None = None
    note: str = NOTE

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "architecture": self.architecture,
            "layers": self.layers,
            "weights": self.weights,
            "dry_run": self.is_dry_run,
            "losses": list(self.losses),
            "criticality": self.criticality.to_json() if self.criticality else None,
            "masked": self.masked,
            "threshold": self.threshold,
            "accuracies": dict(self.accuracies) if self.accuracies else None,
            "note": self.note,
        }


def protect_with_mergeguard(
    expert: Path,
    *,
    base: Path,
    out: Path,
    data: Path | None,
    head: Path | None = None,
    encoder: Path | None = None,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> MergeGuardResult:
    """Write ``expert`` to ``out`` as MergeGuard changes it.

    ``out`` appears complete, or not at all. Killed, the same call goes on where it was, and ends with the same bytes.

    Args:
        expert: checkpoint folder, or a LoRA folder to be merged into ``base`` first.
        base: the checkpoint it was fine-tuned from.
        out: folder to create.
        data: labelled examples of the owner's task (texts for a language model). Needed to train and to rank layers.
        head: file of the head that reads the network's features; None for a network that answers by itself.
        encoder: folder whose tokenizer or image processor prepares the data; None for the expert's.
        settings: of :class:`unmergeable.protections.MergeGuard`.
        seed: of the order of the examples, and of the training.
        threads: that compute on streamed weights; None for all processors.
        dry_run: check everything, write nothing.

    Raises:
        UsageError: a setting is unknown or out of range, or there are no data.
        BadInput: the checkpoints or the data cannot be used, or ``out`` exists; before anything is computed.
        UnmergeableError: the training diverged.
    """
    protection = configure(MergeGuard, settings or {})
    job, network = _checked(expert, base, out, data, head, encoder, protection, seed, progress)
    result = MergeGuardResult(
        out,
        protection.name,
        settings_of(protection),
        job.architecture,
        layers=len(job.layers),
        weights=_weights(job.source, job.names),
        is_dry_run=dry_run,
    )
    if dry_run:
        return result
    folder = out.with_name(out.name + ".training")
    learnt = _Learnt(job.source) if job.tasks is None else _learn(job, network, job.tasks, folder)
    del network  # what follows streams
    result = replace(result, losses=learnt.losses, criticality=learnt.criticality)
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    if protection.masks:
        critical = learnt.criticality.critical if learnt.criticality else ()
        names = [name for layer, its in job.layers.items() if layer not in critical for name in its]
        with one_thread_per_kernel(), ThreadPoolExecutor(worker_threads(threads)) as pool:
            threshold = protection.threshold(learnt.released, job.base, names, each=pool.map, progress=progress)
        result = replace(result, threshold=threshold, masked=protection.rank(_weights(job.source, names)))
        edits = {name: _masking(job, name, threshold) for name in names}
    accuracies = dict(learnt.accuracies)

    def verify(written: TensorSource) -> dict[str, Any]:
        if job.tasks is not None:
            accuracies["protected"] = accuracy(load_network(written.folder).to(_device()), job.tasks.scored)
        return {}

    with one_thread_per_kernel():
        rewrite(
            learnt.released,
            out,
            output_like(learnt.released, edits),
            manifest={"kind": "protected", "recipe": job.recipe, "architecture": job.architecture, "note": NOTE},
            # Other processors may train to other bits, which the losses tell.
            resume_token=f"mergeguard {job.token} {result.losses} {result.threshold}",
            also_read={"base": job.base},
            verify=verify,
            threads=threads,
            progress=progress,
        )
    _remove(folder)
    return replace(result, accuracies=accuracies)


@dataclass(frozen=True)
class _Tasks:
    """All examples, and those that layers are ranked and accuracies measured on."""

    learnt: Task
    scored: Task


@dataclass(frozen=True)
class _Job:
    """A call, after everything that could be refused. ``tasks`` are None where nothing is asked of data."""

    protection: MergeGuard
    source: TensorSource
    base: TensorSource
    architecture: str
    layers: Layers
    tasks: _Tasks | None
    seed: int
    progress: Progress

    @property
    def names(self) -> list[str]:
        """The tensors that may be changed."""
        return [name for names in self.layers.values() for name in names]

    @property
    def recipe(self) -> dict[str, Any]:
        return {"method": self.protection.name, "settings": settings_of(self.protection), "seed": self.seed}

    @cached_property
    def token(self) -> str:
        """Names the job: its recipe, its checkpoints and every example."""
        digest = hashlib.sha256(json.dumps(self.recipe).encode())
        for source in (self.source, self.base):
            digest.update(f"{source.index.headers_digest} {source.index.states}".encode())
        for task in (self.tasks.learnt, self.tasks.scored) if self.tasks else ():
            for batch in task.batches:
                labels = {} if batch.labels is None else {"labels": batch.labels}
                for name, tensor in sorted({**batch.inputs, **labels}.items()):
                    digest.update(f"{name} {list(tensor.shape)}".encode())
                    digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


@dataclass(frozen=True)
class _Learnt:
    """What came of network and data: the weights before masking, and what is known of them."""

    released: TensorSource
    losses: tuple[float, ...] = ()
    criticality: Criticality | None = None
    accuracies: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _TrainedSource(DerivedSource):
    """The expert, but for the tensors that ``file`` holds."""

    file: Path

    @cached_property
    def _trained(self) -> frozenset[str]:
        with safe_open(self.file, "pt") as stored:
            return frozenset(stored.keys())

    def tensor(self, name: str) -> Tensor:
        if name not in self._trained:
            return self.original.tensor(name)
        with safe_open(self.file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor


def _checked(
    expert: Path,
    base: Path,
    out: Path,
    data: Path | None,
    head: Path | None,
    encoder: Path | None,
    protection: MergeGuard,
    seed: int,
    progress: Progress,
) -> tuple[_Job, Any]:
    """The job, if it can be done, and the expert's network if it is needed."""
    if data is None and protection.reads_data:
        raise UsageError(
            "mergeguard trains, and ranks layers, on labelled data; give some with data=FILE, or mask without either: "
            "stages=masking excluded_layers=0."
        )
    if data is not None and not protection.reads_data:
        raise UsageError("mergeguard: masking without excluded layers looks at no data; leave them out.")
    require_absent(out)
    if not out.parent.is_dir():
        raise BadInput(f"{out} cannot be created: its parent folder {out.parent} does not exist; create it first.")
    source, architecture = open_with_architecture(expert, base=base)
    origin = open_base(base, source, architecture)
    known = set(origin.names)
    changeable = [
        name
        for name in source.names
        if name in known
        and origin.spec(name).shape == source.spec(name).shape
        and torch_dtype(source.spec(name).dtype).is_floating_point
    ]
    layers = protection.layers(architecture, changeable)
    if protection.masks:
        protection.excluded_count(layers)  # refuses to exclude all, before anything is loaded
    tasks, network = None, None
    if data is not None:
        # A LoRA folder has neither network nor tokenizer of its own; its weights are put into the base's network below.
        template = base if is_adapter(expert) else expert
        network = load_network(template)

        def task(limit: int | None) -> Task:
            labelled = LabelledData(DataSource(data, seed=seed, limit=limit), encoder or template, head)
            return labelled.task(network, protection.name, batch_size=_SCORING_BATCH)

        scored = task(protection.examples)
        first = next(iter(scored.batches))
        with torch.no_grad():
            scored.predict(network, first).require_targets()  # refuses what the network does not take
        places = find_places(network)
        absent = next((name for names in layers.values() for name in names if name not in places), None)
        if absent is not None:
            raise Mismatch(f"tensor {absent} has no place in the live network: it can be neither trained nor ranked.")
        if template is not expert:
            show(places, {name: source.tensor(name) for name in source.names})
        tasks = _Tasks(task(None) if protection.trains else scored, scored)
    return _Job(protection, source, origin, architecture.family, layers, tasks, seed, progress), network


def _learn(job: _Job, network: Any, tasks: _Tasks, folder: Path) -> _Learnt:
    """Train, and rank the layers of what comes out; what an earlier run of the same job has done is taken from it."""
    folder.mkdir(exist_ok=True)
    network.to(_device())
    accuracies = {"expert": accuracy(network, tasks.scored)}
    losses: tuple[float, ...] = ()
    released = job.source
    if job.protection.trains:
        losses = _train(job, network, tasks.learnt, folder)
        released = _TrainedSource(job.source, folder / _TRAINED)
        accuracies["trained"] = accuracy(network, tasks.scored)
    criticality = None
    if job.protection.masks and job.protection.excluded_count(job.layers):
        criticality = _rank_layers(job, network, tasks.scored, folder)
    return _Learnt(released, losses, criticality, accuracies)


def _train(job: _Job, network: Any, task: Task, folder: Path) -> tuple[float, ...]:
    """Stage 1. The network ends with the weights in ``_TRAINED``, which are rounded as the checkpoint stores them."""
    matrices = {
        layer: [name for name in names if len(job.source.spec(name).shape) > 1] for layer, names in job.layers.items()
    }
    matrices = {layer: names for layer, names in matrices.items() if names}
    stored = read_tensors(folder / _TRAINED, job.token)
    if stored is None:
        kept = Kept(folder / _STATE, job.token)
        losses = disperse(network, task, matrices, job.protection, seed=job.seed, kept=kept, progress=job.progress)
        found = to_disk_names(network, network.state_dict())
        stored = {
            name: found[name].to(torch_dtype(job.source.spec(name).dtype)) for its in matrices.values() for name in its
        }
        stored[_LOSSES] = torch.tensor(losses, dtype=torch.float64)
        write_tensors(folder / _TRAINED, job.token, stored)
        kept.file.unlink(missing_ok=True)
    losses = stored.pop(_LOSSES).tolist()
    show(find_places(network), stored)
    return tuple(losses)


def _rank_layers(job: _Job, network: Any, task: Task, folder: Path) -> Criticality:
    """The layers that stay as they are."""
    file = folder / _CRITICAL
    if file.is_file():
        stored = json.loads(file.read_bytes())
        if stored["token"] == job.token:
            return Criticality.from_json(stored["criticality"])
    found = find_critical_layers(
        network,
        task,
        job.layers,
        job.protection.excluded_count(job.layers),
        confidence=job.protection.confidence,
        progress=job.progress,
    )
    replace_file(file, json.dumps({"token": job.token, "criticality": found.to_json()}).encode())
    return found


def _masking(job: _Job, name: str, threshold: float) -> Callable[[Tensor], Tensor]:
    """Stage 2 of one tensor, in place and in pieces: temporaries of a large one stay small."""

    def mask(tensor: Tensor) -> Tensor:
        pieces = zip(tensor.reshape(-1).split(CHUNK), job.base.tensor(name).reshape(-1).split(CHUNK), strict=True)
        for piece, base in pieces:
            piece.copy_(job.protection.mask(piece, base, threshold))
        return tensor

    return mask


def _weights(source: TensorSource, names: Sequence[str]) -> int:
    return sum(source.spec(name).numel for name in names)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _remove(folder: Path) -> None:
    """The work folder, which holds nothing that is not in the result; somebody else's files stay."""
    for name in (_STATE, _TRAINED, _CRITICAL):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
