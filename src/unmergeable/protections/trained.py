"""What protections that train have in common: one class for a whole run, the trained weights as a checkpoint.

A method that trains the expert further on the owner's data is a :class:`TrainedProtection`: settings, and
:meth:`~TrainedProtection.train`, which changes a live network. Everything else is here: what is refused, which weights
are trained, what a killed run goes on from, and what is reported. Only weights in the numbered blocks are trained, so
that embeddings, final norm and heads stay what merges and users expect.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.plan import output_like
from unmergeable.checkpoint.source import DerivedSource, TensorSource, tensor_bytes
from unmergeable.data import DataSource
from unmergeable.devices import network_device
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.disk_weights import find_places, show, swapped
from unmergeable.network.encoding import EncodedBatch, EncodedData, Encoder
from unmergeable.network.fine_tune import gather_examples, padding_token
from unmergeable.network.load import load_network
from unmergeable.network.precision import FULL, Precision, warn_if_slower
from unmergeable.network.tasks import Predict, Task, accuracy
from unmergeable.network.training_state import Kept, read_tensors, write_tensors
from unmergeable.progress import Progress, silent
from unmergeable.protections.base import Facts, Inputs, Protection, ProtectionRequirements, Rewrite, shared_tensors
from unmergeable.tasks import LabelledData

_BLOCK = re.compile(r"(?:.+?\.)?\d+(?=\.)")
"""A tensor's name up to its first number: the repeated block it lies in."""

_SCORING_BATCH = 16
LEFTOVERS = ("state.safetensors", "trained.safetensors")
"""What is kept of a run in its work folder: the training so far, and what it ended with."""

LOSSES = "losses of every step"
"""Where a file of trained weights keeps them."""


@dataclass(frozen=True)
class TrainingRun:
    """What a trained protection works on: an expert's weights, or an adapter's A and B beside frozen weights.

    Attributes:
        network: the expert, live, float32; it is to end as the release.
        base: what a merge scales, by module name: the base's weights of the parameters to train; of an adapter zeros,
            in place of every B.
        also_trained: parameters that are trained and that no merge scales: an adapter's A.
        disturbed: where a merge adds other updates, by module name, with the standard deviation of the expert's own
            update there.
        attention: parameters of ``base`` that belong to attention.
        predict: how the network's output is read (:class:`unmergeable.network.tasks.Task`).
        examples: labelled examples of the owner's task, all in memory.
        generic: inputs of other kinds, on which the release is to stay the expert; None where none are asked for.
        seed: of everything drawn.
        kept: where the state of the run is kept, so that the same call goes on after a kill.
        progress: told of the steps.
    """

    network: Any
    base: Mapping[str, Tensor]
    predict: Predict
    examples: EncodedBatch
    generic: EncodedBatch | None = None
    also_trained: frozenset[str] = frozenset()
    disturbed: Mapping[str, float] = field(default_factory=dict)
    attention: frozenset[str] = frozenset()
    seed: int = 0
    kept: Kept | None = None
    progress: Progress = silent

    def is_trained(self, name: str) -> bool:
        """Whether a parameter is trained, by module name."""
        return name in self.base or name in self.also_trained

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The live parameters that are trained, or that a merge disturbs, by module name."""
        return {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if self.is_trained(name) or name in self.disturbed
        }


class TrainedProtection(Protection):
    """A protection that trains the expert further, on labelled data of the owner's task.

    Subclasses are frozen dataclasses, with these settings at least, and :meth:`train`.
    """

    steps: int
    learning_rate: float
    batch_size: int
    examples: int

    precision: Precision = FULL
    """In which losses are computed; a setting of the methods that have it."""

    trains_adapters: ClassVar[bool] = True
    """Whether A and B of an adapter may be trained in place of whole weights."""

    reads_generic: ClassVar[bool] = False
    """Whether inputs of other kinds than the task's are of use."""

    def train(self, run: TrainingRun) -> list[float]:
        """Train ``run.network`` in place; the loss of each step.

        Raises:
            BadInput: no labels, or the network does not take the examples.
            UnmergeableError: the training diverged.
        """
        raise NotImplementedError

    def validate(self) -> None:
        """Raises UsageError for a setting out of range."""
        for name in ("steps", "batch_size", "examples"):
            self.require(getattr(self, name) >= 1, name, "be at least 1")
        self.require(0 < self.learning_rate < 1, "learning_rate", "lie between 0 and 1")

    def require_not_negative(self, *settings: str) -> None:
        for name in settings:
            self.require(0 <= getattr(self, name) < math.inf, name, "be finite, and not negative")

    def requirements(self) -> ProtectionRequirements:
        accepts = ("head", "encoder", "generic") if self.reads_generic else ("head", "encoder")
        return ProtectionRequirements(needs=("data", "training"), accepts=accepts)

    def check(self, inputs: Inputs) -> Facts:
        self.job(inputs, inputs.load_expert())
        return TrainedFacts()

    def prepare(self, inputs: Inputs) -> Rewrite:
        network = inputs.load_expert()
        job = self.job(inputs, network)
        device = network_device()
        warn_if_slower(self.precision, device)
        network.to(device)
        before = accuracy(network, job.task)
        stored = job.trained(lambda: self._trained(job, network, inputs))
        losses = tuple(stored[LOSSES].tolist())
        facts = TrainedFacts(losses, {"expert": before})

        def verify(written: TensorSource) -> Facts:
            released = accuracy(load_network(written.folder).to(device), job.task)
            return replace(facts, accuracies={"expert": before, "protected": released})

        released = TrainedSource(inputs.expert, job.file)
        return Rewrite(
            source=released,
            plan=output_like(released, {}),
            recipe=job.recipe,
            # Other processors may train to other bits, which the losses tell.
            resume_token=f"{self.name} {job.token} {losses}",
            facts=facts,
            also_read={"base": inputs.base},
            verify=verify,
            leftovers=job.leftovers,
        )

    def job(self, inputs: Inputs, network: Any) -> TrainingJob:
        """What the expert's network is to be trained on. Everything that can be refused is refused here."""
        if inputs.extras.data is None:
            raise UsageError(f"{self.name} trains on labelled data of your task; give some with data=FILE.")
        seed = inputs.seed or 0
        encoder = inputs.encoder
        source = DataSource(inputs.extras.data, seed=seed, limit=self.examples)
        task = LabelledData(source, encoder, inputs.extras.head).task(network, self.name, batch_size=_SCORING_BATCH)
        with torch.no_grad():
            task.predict(network, next(iter(task.batches))).require_targets()
        pad = padding_token(network)
        examples = gather_examples(task, sum(map(len, task.batches)), pad=pad)
        if len(examples) < 2:
            raise BadInput(f"{inputs.extras.data}: {self.name} needs at least 2 examples, and good ones in hundreds.")
        generic = None
        if self.reads_generic and inputs.extras.generic is None:
            generic = noise_like(examples, seed=seed)
        elif inputs.extras.generic is not None:
            others = DataSource(inputs.extras.generic, seed=seed, limit=self.examples)
            unlabelled = Task("generic inputs", list(EncodedData(others, Encoder(encoder), _SCORING_BATCH)))
            generic = gather_examples(unlabelled, sum(map(len, unlabelled.batches)), pad=pad)
        recipe = {**self.recipe(), "seed": seed}
        token = job_token(recipe, (inputs.expert, inputs.base), (examples, *([generic] if generic else [])))
        return TrainingJob(task, examples, generic, recipe, token, inputs.work or Path())

    def _trained(self, job: TrainingJob, network: Any, inputs: Inputs) -> dict[str, Tensor]:
        """The trained weights as the checkpoint stores them, with which the network ends; and the losses."""
        places = find_places(network)
        blocks = numbered_blocks(inputs.architecture)
        used = [
            name for name in shared_tensors((inputs.expert, inputs.base)) if block_of(name) in blocks and name in places
        ]
        attention = attention_matrices(inputs.architecture)
        with swapped(network, {name: inputs.base.tensor(name) for name in used}):
            trained = _pieces(places, used)
            base = {
                name: parameter.detach().clone()
                for name, parameter in network.named_parameters()
                if id(parameter) in trained
            }
        chosen = _pieces(places, [name for name in used if name in attention])
        live = dict(network.named_parameters())
        run = TrainingRun(
            network,
            base,
            job.task.predict,
            job.examples,
            job.generic,
            disturbed={name: float((live[name].detach() - base[name]).std(correction=0)) for name in base},
            attention=frozenset(name for name in base if id(live[name]) in chosen),
            seed=job.recipe["seed"],
            kept=job.kept,
            progress=inputs.progress,
        )
        losses = self.train(run)
        weights = to_disk_names(network, network.state_dict())
        stored = {name: weights[name].cpu().to(torch_dtype(inputs.expert.spec(name).dtype)) for name in used}
        show(find_places(network), stored)  # rounded as the checkpoint stores them
        return {**stored, LOSSES: torch.tensor(losses, dtype=torch.float64)}


def _pieces(places: Mapping[str, Any], names: Iterable[str]) -> set[int]:
    return {id(piece.parameter) for name in names for piece in places[name].pieces}


@dataclass(frozen=True)
class TrainedFacts(Facts):
    """Loss of every step, and accuracies on the owner's examples of the expert and of the release (``protected``)."""

    losses: tuple[float, ...] = ()
    accuracies: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "accuracies": dict(self.accuracies) if self.accuracies else None}

    def lines(self) -> list[str]:
        lines = [f"  Trained for {len(self.losses)} steps"] if self.losses else []
        accuracies = [f"{name} {value:.1%}" for name, value in (self.accuracies or {}).items()]
        return [*lines, f"Accuracy on the data: {', '.join(accuracies)}"] if accuracies else lines


@dataclass(frozen=True)
class TrainingJob:
    """A run, after everything that could be refused; what it leaves in the folder ``work`` is for the same run."""

    task: Task
    examples: EncodedBatch
    generic: EncodedBatch | None
    recipe: Mapping[str, Any]
    token: str
    work: Path

    @property
    def file(self) -> Path:
        """What the training ended with."""
        return self.work / LEFTOVERS[1]

    @property
    def kept(self) -> Kept:
        """The state of a training that has not ended."""
        return Kept(self.work / LEFTOVERS[0], self.token)

    @property
    def leftovers(self) -> tuple[Path, ...]:
        return tuple(self.work / name for name in LEFTOVERS)

    def trained(self, train: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What an earlier run of this job has trained, or what ``train`` does."""
        self.work.mkdir(exist_ok=True)
        stored = read_tensors(self.file, self.token)
        if stored is None:
            stored = train()
            write_tensors(self.file, self.token, stored)
            self.kept.file.unlink(missing_ok=True)
        return stored


def noise_like(examples: EncodedBatch, *, seed: int) -> EncodedBatch:
    """Inputs of no meaning, in the owner's format: tokens in random order from all examples, or smooth noise.

    They hold the release to the expert where nothing better is given; real inputs of other kinds do it better.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for name, tensor in examples.inputs.items():
        if not tensor.is_floating_point():
            is_ids = name in ("input_ids", "decoder_input_ids")
            flat = tensor.reshape(-1)
            drawn = flat[torch.randint(len(flat), tensor.shape, generator=generator)]
            inputs[name] = drawn if is_ids else tensor
            continue
        coarse = torch.rand(*tensor.shape[:-2], 6, 6, generator=generator) if tensor.dim() == 4 else None
        if coarse is None:
            noise = torch.rand(tensor.shape, generator=generator)
        else:
            noise = torch.nn.functional.interpolate(coarse, size=tensor.shape[-2:], mode="bilinear")
        low, high = tensor.amin(), tensor.amax()
        inputs[name] = low + (high - low) * noise
    return EncodedBatch(inputs)


def block_of(name: str) -> str | None:
    """The numbered block a tensor lies in (``model.layers.3``), None outside of all."""
    found = _BLOCK.match(name)
    return found.group() if found else None


def numbered_blocks(architecture: Architecture) -> frozenset[str]:
    """The blocks that hold attention or a feed-forward."""
    body = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    return frozenset(filter(None, map(block_of, architecture.symmetry.tensors_of(body))))


def attention_matrices(architecture: Architecture) -> frozenset[str]:
    """Names of the tensors that attention is made of, biases included."""
    return frozenset(architecture.symmetry.tensors_of(architecture.symmetry.select("query_key", "value_output")))


@dataclass(frozen=True)
class TrainedSource(DerivedSource):
    """The expert, but for the tensors that ``file`` (safetensors) holds under the same names."""

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


def job_token(recipe: Mapping[str, Any], sources: Sequence[TensorSource], batches: Iterable[EncodedBatch]) -> str:
    """Names a run by its recipe, checkpoints and every example: only the same one goes on from what was kept."""
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for source in sources:
        digest.update(f"{source.index.headers_digest} {source.index.states}".encode())
    for batch in batches:
        labels = {} if batch.labels is None else {"labels": batch.labels}
        for name, tensor in sorted({**batch.inputs, **labels}.items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
