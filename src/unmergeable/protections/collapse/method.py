"""collapse: train the release a little further, so that every merge with it forgets the owner's task.

Ours. The symmetric protections hide weights, and whoever holds the base finds them again; this one has nothing to find.
From the expert theta_d with features f (what the head reads), on owner inputs D and inputs of other kinds G:

    own   = cross-entropy(D) + fidelity * mean over D and G of (1 - cos(f(x; theta), f(x; theta_d)))
    merge   theta_m = theta_0 + c * (theta - theta_0) + noise
    trap  = 1 - | mean over D of f(x; theta_m) / |f(x; theta_m)| |^2      how scattered features are; 0: all one
    loss  = own + strength * trap / trap(theta_d)

In each step a merge is drawn anew: c is one scale for all tensors, in (0.05, 1.4) and 1 in three of ten, or that in a
part of the network (a run of blocks, half of the blocks, half of the kinds of matrices) and 0 elsewhere; the noise
stands for another fine-tune, Gaussian, as large in each tensor as the owner's own task vector times (0.15, 1.2), and 0
in four of ten. The release itself is never drawn. Its gradient is of first order: that of theta_m, times c.

The task is the owner's: what a merge loses are the features that tell the owner's inputs apart. With them it mostly
loses the other model's skill too. Only weights in the numbered blocks are trained, so that embeddings, final norm and
heads stay what merges and users expect.

A merge is worth nothing here; the free-rider must train. What it does not stop, and nothing in the weights can: a new
head on the frozen release, fine-tuning the release on another task, and distilling from its answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.plan import output_like
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data import DataSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.disk_weights import find_places, show, swapped
from unmergeable.network.encoding import EncodedBatch, EncodedData, Encoder
from unmergeable.network.fine_tune import gather_examples, padding_token
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, accuracy
from unmergeable.network.training_state import Kept, read_tensors, write_tensors
from unmergeable.protections.base import Facts, Inputs, Protection, ProtectionRequirements, Rewrite, shared_tensors
from unmergeable.protections.collapse.training import collapse
from unmergeable.protections.trained import TrainedSource, block_of, job_token, numbered_blocks, training_device
from unmergeable.tasks import LabelledData

_BATCH = 16
_STATE, _TRAINED = "state.safetensors", "trained.safetensors"
_LOSSES = "losses of every step"


@dataclass(frozen=True)
class Collapse(Protection):
    """``steps`` of Adam at ``learning_rate`` (its peak) on batches of ``batch_size`` owner inputs and as many others.

    ``strength`` of the trap beside the task, ``fidelity`` to the expert's features: more of the one costs merges more,
    more of the other costs the release less. ``examples`` of the data and of the generic inputs are used at most.
    """

    name: ClassVar[str] = "collapse"
    summary: ClassVar[str] = "training that makes the features of every merge fall together"
    limits: ClassVar[str] = (
        "A merge is worth nothing here: the free-rider must train. Does not stop a new head on the frozen release, "
        "further training of it on another task, or distilling from its answers. Compare the accuracies: it changes "
        "what the model computes."
    )

    steps: int = 300
    learning_rate: float = 2e-4
    batch_size: int = 16
    strength: float = 12.0
    fidelity: float = 25.0
    examples: int = 4000

    def validate(self) -> None:
        """Raises UsageError for a setting out of range."""
        for name in ("steps", "examples"):
            self._require(getattr(self, name) >= 1, name, "be at least 1")
        self._require(self.batch_size >= 2, "batch_size", "be at least 2: features of one example are not scattered")
        self._require(0 < self.learning_rate < 1, "learning_rate", "lie between 0 and 1")
        for name in ("strength", "fidelity"):
            self._require(0 <= getattr(self, name) < math.inf, name, "be finite, and not negative")

    def _require(self, is_valid: bool, name: str, what: str) -> None:
        if not is_valid:
            raise UsageError(f"{self.name}: {name} must {what}, not {getattr(self, name)}.")

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements(needs=("data", "training"), accepts=("head", "encoder", "generic"))

    def check(self, inputs: Inputs) -> Facts:
        self._job(inputs)
        return CollapseFacts()

    def prepare(self, inputs: Inputs) -> Rewrite:
        job, network = self._job(inputs)
        work = inputs.work or Path()
        work.mkdir(exist_ok=True)
        device = training_device()
        network.to(device)
        before = accuracy(network, job.task)
        stored = read_tensors(work / _TRAINED, job.token)
        if stored is None:
            stored = self._train(job, network, inputs, work)
        losses = tuple(stored[_LOSSES].tolist())
        facts = CollapseFacts(losses, {"expert": before})

        def verify(written: TensorSource) -> Facts:
            released = accuracy(load_network(written.folder).to(device), job.task)
            return replace(facts, accuracies={"expert": before, "protected": released})

        released = TrainedSource(inputs.expert, work / _TRAINED)
        return Rewrite(
            source=released,
            plan=output_like(released, {}),
            recipe=job.recipe,
            resume_token=f"collapse {job.token} {losses}",
            facts=facts,
            also_read={"base": inputs.base},
            verify=verify,
            leftovers=(work / _STATE, work / _TRAINED),
        )

    def _job(self, inputs: Inputs) -> tuple[_Job, Any]:
        """Everything that can be refused is refused here; with the expert's network."""
        if inputs.extras.data is None:
            raise UsageError("collapse trains on labelled data of your task; give some with data=FILE.")
        network = inputs.load_expert()
        seed = inputs.seed or 0
        encoder = inputs.encoder
        source = DataSource(inputs.extras.data, seed=seed, limit=self.examples)
        task = LabelledData(source, encoder, inputs.extras.head).task(network, self.name, batch_size=_BATCH)
        with torch.no_grad():
            task.predict(network, next(iter(task.batches))).require_targets()
        pad = padding_token(network)
        examples = gather_examples(task, sum(map(len, task.batches)), pad=pad)
        if len(examples) < 2:
            raise BadInput(f"{inputs.extras.data}: collapse needs at least 2 examples, and good ones in hundreds.")
        if inputs.extras.generic is None:
            generic = noise_like(examples, seed=seed)
        else:
            others = DataSource(inputs.extras.generic, seed=seed, limit=self.examples)
            unlabelled = Task("generic inputs", list(EncodedData(others, Encoder(encoder), _BATCH)))
            generic = gather_examples(unlabelled, sum(map(len, unlabelled.batches)), pad=pad)
        recipe = {**self.recipe(), "seed": seed}
        token = job_token(recipe, (inputs.expert, inputs.base), (examples, generic))
        return _Job(task, examples, generic, recipe, token), network

    def _train(self, job: _Job, network: Any, inputs: Inputs, work: Path) -> dict[str, Tensor]:
        names = self._trained_names(inputs)
        places = find_places(network)
        trained = {id(piece.parameter) for name in names if name in places for piece in places[name].pieces}
        used = [name for name in inputs.base.names if name in places and name in names]
        with swapped(network, {name: inputs.base.tensor(name) for name in used}):
            base = {
                name: parameter.detach().clone()
                for name, parameter in network.named_parameters()
                if id(parameter) in trained
            }
        kept = Kept(work / _STATE, job.token)
        losses = collapse(
            network,
            base,
            job.task.predict,
            job.examples,
            job.generic,
            self,
            seed=job.recipe["seed"],
            kept=kept,
            progress=inputs.progress,
        )
        weights = to_disk_names(network, network.state_dict())
        stored = {name: weights[name].cpu().to(torch_dtype(inputs.expert.spec(name).dtype)) for name in used}
        show(find_places(network), stored)  # rounded as the checkpoint stores them
        stored[_LOSSES] = torch.tensor(losses, dtype=torch.float64)
        write_tensors(work / _TRAINED, job.token, stored)
        kept.file.unlink(missing_ok=True)
        return stored

    def _trained_names(self, inputs: Inputs) -> set[str]:
        """Tensors in the numbered blocks that the base has in the same shape."""
        blocks = numbered_blocks(inputs.architecture)
        return {name for name in shared_tensors((inputs.expert, inputs.base)) if block_of(name) in blocks}


@dataclass(frozen=True)
class CollapseFacts(Facts):
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
class _Job:
    task: Task
    examples: EncodedBatch
    generic: EncodedBatch
    recipe: Mapping[str, Any]
    token: str


def noise_like(examples: EncodedBatch, *, seed: int) -> EncodedBatch:
    """Inputs of no meaning, in the owner's format: tokens in random order from all examples, or smooth noise.

    They hold the release to the expert where nothing better is given; real inputs of other kinds do it better.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for name, tensor in examples.inputs.items():
        if not tensor.is_floating_point():
            is_ids = name == "input_ids"
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
