"""Training behind ``collapse``: the release stays what the expert is, and every merge with it loses the features.

:mod:`.method` has the formula. A merge is made by putting its weights into the live network, so that memory holds one
network, its gradient, and three copies of the trained weights (base, expert, merge):

    theta_m   = theta_0 + c (theta - theta_0) + noise          c: one coefficient for each tensor
    d trap / d theta = c * d trap / d theta_m                  first order; no graph through the merge is kept
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import select
from unmergeable.network.tasks import Predict, asks_next_token, device_of
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.network.training_state import Kept
from unmergeable.progress import Progress, silent
from unmergeable.protections.trained import block_of
from unmergeable.randomness import Stream

if TYPE_CHECKING:
    from unmergeable.protections.collapse.method import Collapse

Weights = Mapping[str, Tensor]
"""Trained parameters by module name."""

SCALES = (0.05, 1.4)
NOISES = (0.15, 1.2)
"""Ranges of the release's coefficient in a sampled merge, and of the other fine-tune's size beside the expert's."""


@dataclass(frozen=True)
class SampledMerge:
    """``coefficients`` of the release's task vector, by tensor; ``noise`` is the size of what else is added."""

    coefficients: Mapping[str, float]
    noise: float


def sample_merge(names: Sequence[str], stream: Stream) -> SampledMerge:
    """A merge that a free-rider may make of the release: scaled, in part, and with something added.

    The release itself is never drawn: something is added, a part is left out, or the scale is off 1 by 0.15 or more.
    """
    whole, has_noise, has_parts, drawn, size, kind = stream.child("choices").uniform(6)
    noise = NOISES[0] + size * (NOISES[1] - NOISES[0]) if has_noise < 0.6 else 0.0
    kept = _kept_parts(names, kind, stream.child("parts")) if has_parts < 0.5 else set(names)
    scale = 1.0 if whole < 0.3 else SCALES[0] + drawn * (SCALES[1] - SCALES[0])
    if noise == 0 and len(kept) == len(names) and abs(scale - 1) < 0.15:
        scale = 0.85 if scale < 1 else 1.15
    return SampledMerge({name: scale if name in kept else 0.0 for name in names}, noise)


def _kept_parts(names: Sequence[str], kind: float, stream: Stream) -> set[str]:
    """Some of the tensors: a run of neighbouring blocks, any half of them, or half of the kinds of tensors."""
    places = {name: _place(name) for name in names}
    group = 1 if kind >= 0.75 else 0
    groups = list(dict.fromkeys(place[group] for place in places.values()))
    if kind < 0.45 and len(groups) > 1:
        first, last = sorted(int(cut * (len(groups) + 1)) for cut in stream.uniform(2))
        chosen = set(groups[first:last])
    else:
        chosen = {one for one, drawn in zip(groups, stream.uniform(len(groups)), strict=True) if drawn < 0.5}
    return {name for name, place in places.items() if place[group] in chosen}


def _place(name: str) -> tuple[str, str]:
    """The numbered block a tensor lies in, and what it is there."""
    block = block_of(name) or ""
    return block, re.sub(r"\.(weight|bias)$", "", name.removeprefix(f"{block}."))


@dataclass(frozen=True)
class Reading:
    """Answers to a batch: ``features`` are what the head reads, [choices, hidden], ``logits`` its output."""

    features: Tensor
    logits: Tensor
    targets: Tensor | None


Read = Callable[[nn.Module, EncodedBatch], Reading]


def reader_of(network: nn.Module, predict: Predict, batch: EncodedBatch) -> Read:
    """How to read features beside answers.

    ``predict`` of a head outside the network (:class:`unmergeable.tasks.FeatureHead`) knows its features. Otherwise the
    output layer is the linear layer whose output the logits are, and its inputs are the features.

    Raises:
        BadInput: the logits are the output of no linear layer.
    """
    head = getattr(predict, "__self__", None)
    if head is not None and hasattr(head, "features"):

        def read_pooled(network: nn.Module, batch: EncodedBatch) -> Reading:
            features: Tensor = head.features(network, batch)
            return Reading(features, head.logits(features), batch.labels)

        return read_pooled
    layer = _output_layer(network, predict, batch)
    seen: list[Tensor] = []

    def read(network: nn.Module, batch: EncodedBatch) -> Reading:
        handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            prediction = predict(network, batch)
        finally:
            handle.remove()
        hidden = seen.pop()
        seen.clear()
        if hidden.dim() == 3:
            hidden = hidden[:, :-1][asks_next_token(batch)]
        return Reading(hidden, prediction.logits, prediction.targets)

    return read


@torch.no_grad()
def _output_layer(network: nn.Module, predict: Predict, batch: EncodedBatch) -> nn.Module:
    outputs: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append((module, output)))
        for module in network.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        logits = predict(network, batch).logits
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(outputs):
        if output.shape[-1] == logits.shape[-1] and output.dim() in (2, 3):
            return module
    raise BadInput(
        f"{type(network).__name__}: its answers are the output of no linear layer; give the task's head with head=FILE."
    )


def scatter(features: Tensor) -> Tensor:
    """How far features point in different directions: 1 - |mean of f / |f||^2, in [0, 1]; 0 where all point one way."""
    return 1 - functional.normalize(features.float(), dim=-1).mean(dim=0).square().sum()


@dataclass(frozen=True)
class Teacher:
    """What the expert makes of examples: the features of each, [choices, hidden]."""

    features: tuple[Tensor, ...]

    def of(self, numbers: Tensor) -> Tensor:
        """Features of these examples, one below the other."""
        return torch.cat([self.features[number] for number in numbers.tolist()])


@torch.no_grad()
def ask_teacher(network: nn.Module, read: Read, examples: EncodedBatch, *, batch_size: int) -> Teacher:
    """The features of every example, on the CPU."""
    kept: list[Tensor] = []
    device = device_of(network)
    for numbers in torch.arange(len(examples)).split(batch_size):
        batch = select(examples, numbers)
        features = read(network, batch.to(device)).features.float().cpu()
        has_one_each = len(features) == len(numbers)
        kept += features.split(1 if has_one_each else asks_next_token(batch).sum(dim=1).tolist())
    return Teacher(tuple(kept))


def collapse(
    network: nn.Module,
    base: Weights,
    predict: Predict,
    examples: EncodedBatch,
    generic: EncodedBatch | None,
    method: Collapse,
    *,
    seed: int = 0,
    kept: Kept | None = None,
    progress: Progress = silent,
) -> list[float]:
    """Train the network in place so that merges with it lose the task; returns the loss of each step.

    Args:
        network: the expert, live, float32; it ends as the release.
        base: the base's weights of the parameters to train, by module name.
        predict: how the network's output is read (:class:`unmergeable.network.tasks.Task`).
        examples: labelled examples of the owner's task, all in memory.
        generic: inputs of other kinds, on which the release is to stay the expert; None for none.
        method: what to do.
        seed: of batches, sampled merges and dropout.
        kept: where the state of the run is kept, so that the same call goes on after a kill.

    Raises:
        BadInput: no labels, or the network does not take the examples.
        UnmergeableError: the training diverged.
    """
    device = device_of(network)
    network.eval()
    read = reader_of(network, predict, select(examples, torch.arange(1)).to(device))
    teachers = [
        ask_teacher(network, read, data, batch_size=method.batch_size)
        for data in (examples, *([] if generic is None else [generic]))
    ]
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in base}
    sizes = {name: float((parameter.detach() - base[name]).std(correction=0)) for name, parameter in parameters.items()}
    stream = Stream.from_seed(seed).child("collapse")
    first = next(shuffled_batches(len(examples), min(method.batch_size, len(examples)), seed))
    reference = max(float(scatter(teachers[0].of(first))), 1e-6)

    def batches() -> Iterator[Batch]:
        orders = [
            shuffled_batches(len(data), min(method.batch_size, len(data)), seed + number)
            for number, data in enumerate((examples, *([] if generic is None else [generic])))
        ]
        for step in range(method.steps):
            yield (torch.tensor(step), *(next(order) for order in orders))

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        step, numbers, *others = (tensor.cpu() for tensor in batch)
        owner = select(examples, numbers).to(device)
        reading = read(network, owner)
        if reading.targets is None:
            raise BadInput("collapse trains on labelled examples; give a label with each.")
        teacher = teachers[0].of(numbers).to(device)
        own = functional.cross_entropy(reading.logits.float(), reading.targets)
        cosines = [functional.cosine_similarity(reading.features.float(), teacher, dim=-1)]
        for other in others:
            assert generic is not None
            found = read(network, select(generic, other).to(device)).features.float()
            cosines.append(functional.cosine_similarity(found, teachers[1].of(other).to(device), dim=-1))
        own = own + method.fidelity * (1 - torch.cat(cosines)).mean()
        merge = sample_merge(list(parameters), stream.child(f"step {int(step)}"))
        ramp = min(1.0, (int(step) + 1) / max(1, method.steps // 10))
        trap, gradients = trap_of(
            network, read, owner, parameters, base, sizes, merge, stream.child(f"noise {int(step)}")
        )
        weight = ramp * method.strength / reference
        pulled = torch.stack([(parameters[name] * gradient).sum() for name, gradient in gradients.items()]).sum()
        # The value is the trap's; the gradient is the one found at the merge.
        return own + weight * (pulled - pulled.detach() + trap)

    return train(
        network,
        batches(),
        loss,
        Schedule(method.steps, method.learning_rate, max_gradient_norm=math.inf),
        is_trained=base.__contains__,
        seed=seed,
        kept=kept,
        stage="collapsing merges",
        progress=progress,
    )


def trap_of(
    network: nn.Module,
    read: Read,
    batch: EncodedBatch,
    parameters: Mapping[str, nn.Parameter],
    base: Weights,
    sizes: Mapping[str, float],
    merge: SampledMerge,
    stream: Stream,
) -> tuple[float, dict[str, Tensor]]:
    """Scatter of the batch's features in a merge, and its gradient by the release's weights."""
    with merged(parameters, base, sizes, merge, stream), torch.enable_grad():
        value = scatter(read(network, batch).features)
        touched = {name: parameter for name, parameter in parameters.items() if merge.coefficients[name] != 0}
        if not touched:
            return float(value.detach()), {next(iter(parameters)): torch.zeros(())}
        found = torch.autograd.grad(value, list(touched.values()), allow_unused=True)
    gradients = {
        name: gradient * merge.coefficients[name]
        for name, gradient in zip(touched, found, strict=True)
        if gradient is not None
    }
    return float(value.detach()), gradients


@contextmanager
def merged(
    parameters: Mapping[str, nn.Parameter],
    base: Weights,
    sizes: Mapping[str, float],
    merge: SampledMerge,
    stream: Stream,
) -> Iterator[None]:
    """The network with the weights of a merge inside, and with its own again outside."""
    generator = torch.Generator().manual_seed(int(stream.uniform(1)[0] * 2**53))
    own = {name: parameter.data for name, parameter in parameters.items()}
    factors = 0.5 + stream.child("sizes").uniform(len(parameters))
    try:
        for (name, parameter), factor in zip(parameters.items(), factors.tolist(), strict=True):
            origin = base[name].to(parameter.device)
            mixed = torch.lerp(origin, own[name], merge.coefficients[name])
            if merge.noise:
                noise = torch.randn(mixed.shape, generator=generator).to(mixed)
                mixed.add_(noise, alpha=merge.noise * factor * sizes[name])
            parameter.data = mixed
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
