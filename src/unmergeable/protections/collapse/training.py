"""Training behind ``collapse``: the release stays what the expert is, and every merge with it loses the features.

:mod:`.method` has the formula, :mod:`unmergeable.protections.merged_loss` the gradient at a merge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import select
from unmergeable.network.tasks import Predict, asks_next_token, device_of
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.protections.merged_loss import as_loss, gradient_at_merge
from unmergeable.protections.trained import TrainingRun, block_of
from unmergeable.randomness import Stream

if TYPE_CHECKING:
    from unmergeable.protections.collapse.method import Collapse

SCALES = (0.05, 1.4)
NOISES = (0.15, 1.2)
"""Ranges of the release's coefficient in a sampled merge, and of the other fine-tune's size beside the expert's."""

DOUBT = 1e-3
"""What a right answer lacks to certainty at least, for the trap of answers, which would have no bound without it."""


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


Target = Literal["features", "answers"]
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


def right_answers(reading: Reading) -> Tensor:
    """How sure the right answers are: the mean of -log(1 - p), p the probability of each; 0 where none is given.

    Where answers are nearly sure its slope is 1, and that of a raised cross-entropy vanishes; and it has a bound below.
    A certain answer counts as one of 1 - :data:`DOUBT`.
    """
    if reading.targets is None:
        raise BadInput("collapse trains on labelled examples; give a label with each.")
    chosen = functional.log_softmax(reading.logits.float(), dim=-1).gather(1, reading.targets[:, None])
    return -torch.log1p(-(1 - DOUBT) * chosen.exp()).mean()


def caught(reading: Reading, target: Target) -> Tensor:
    """What the trap is to bring to 0."""
    return scatter(reading.features) if target == "features" else right_answers(reading)


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


def collapse(run: TrainingRun, method: Collapse) -> list[float]:
    """Train the network in place so that merges with it lose the task; returns the loss of each step.

    Raises:
        BadInput: no labels, or the network does not take the examples.
        UnmergeableError: the training diverged.
    """
    network, examples, generic = run.network, run.examples, run.generic
    device = device_of(network)
    network.eval()
    read = reader_of(network, run.predict, select(examples, torch.arange(1)).to(device))
    kinds = (examples, *([] if generic is None else [generic]))
    teachers = [ask_teacher(network, read, data, batch_size=method.batch_size) for data in kinds]
    parameters = run.parameters
    stream = Stream.from_seed(run.seed).child("collapse")
    first = select(examples, next(shuffled_batches(len(examples), min(method.batch_size, len(examples)), run.seed)))
    with torch.no_grad():
        reference = max(float(caught(read(network, first.to(device)), method.target)), 1e-6)

    def batches() -> Iterator[Batch]:
        orders = [
            shuffled_batches(len(data), min(method.batch_size, len(data)), run.seed + number)
            for number, data in enumerate(kinds)
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
        merge = sample_merge(list(run.base), stream.child(f"step {int(step)}"))
        noise, generator = noise_of(merge, run.disturbed, stream.child(f"noise {int(step)}"))
        trap, gradients = gradient_at_merge(
            lambda: caught(read(network, owner), method.target),
            parameters,
            run.base,
            merge.coefficients,
            noise,
            generator,
        )
        ramp = min(1.0, (int(step) + 1) / max(1, method.steps // 10))
        return own + ramp * method.strength / reference * as_loss(trap, gradients, parameters)

    return train(
        network,
        batches(),
        loss,
        Schedule(method.steps, method.learning_rate, max_gradient_norm=math.inf),
        is_trained=run.is_trained,
        seed=run.seed,
        kept=run.kept,
        precision=method.precision,
        stage="collapsing merges",
        progress=run.progress,
    )


def noise_of(
    merge: SampledMerge, sizes: Mapping[str, float], stream: Stream
) -> tuple[dict[str, float], torch.Generator]:
    """What stands for another fine-tune in a merge: standard deviations by tensor, and who draws."""
    generator = torch.Generator().manual_seed(int(stream.uniform(1)[0] * 2**53))
    if not merge.noise:
        return {}, generator
    factors = 0.5 + stream.child("sizes").uniform(len(sizes))
    noise = {
        name: merge.noise * factor * size for (name, size), factor in zip(sizes.items(), factors.tolist(), strict=True)
    }
    return noise, generator
