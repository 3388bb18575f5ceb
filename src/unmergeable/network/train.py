"""Fine-tuning: AdamW with a linear warm-up and a cosine decay to zero, for a fixed number of steps.

The loop knows nothing of models or data: the caller gives batches in the order they are to be seen and a loss, so
one seed on the caller's side decides the run. A penalty on weights is part of the loss, which is given the network.

Why not the Trainer of transformers: it wants data sets and collators of its own, is silent about what it does to
randomness, and keeps a run by writing whole models and pickled optimizer states into folders. This loop is a page,
resumes bit by bit from one safetensors file (:mod:`.training_state`), and is the same for every network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from unmergeable.errors import UnmergeableError, UsageError
from unmergeable.network.precision import FULL, Precision, computing_in
from unmergeable.network.training_state import Kept, restore_state, write_state
from unmergeable.progress import Progress, silent

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]
"""The network and a batch on its device, to a scalar."""


@dataclass(frozen=True)
class Schedule:
    """How far and how fast. ``warmup`` is the fraction of the steps in which the rate climbs to its peak."""

    steps: int
    learning_rate: float = 3e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0: never zero at either end, so no step is wasted."""
        climb = (step + 1) / max(1.0, self.warmup * self.steps)
        return self.learning_rate * min(1.0, climb) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def train(
    network: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    schedule: Schedule,
    *,
    is_trained: Callable[[str], bool] = lambda name: True,
    seed: int = 0,
    kept: Kept | None = None,
    precision: Precision = FULL,
    stage: str = "training",
    progress: Progress = silent,
) -> list[float]:
    """Change the network's weights in place; it ends in evaluation mode.

    Killed, the same call with the same ``kept`` goes on from the last state kept, and ends with the same bits.

    Args:
        network: on any device; batches are moved there.
        batches: at least ``schedule.steps`` of them. A resumed run draws those it has seen again, to skip them.
        loss: mean loss of a batch.
        is_trained: which parameters may change, by module name; the others stay bit for bit.
        seed: of the network's own randomness (dropout); the global generator is put back afterwards.
        kept: where the run keeps its state; None keeps nothing.
        precision: in which the loss is computed; weights keep theirs.

    Returns:
        The loss of each step, before that step was taken.

    Raises:
        UsageError: no parameter to train, or too few batches.
        UnmergeableError: the loss is no longer finite.
    """
    named = {name: parameter for name, parameter in network.named_parameters() if is_trained(name)}
    trained = list(named.values())
    if not trained:
        raise UsageError("no parameter is left to train; widen the choice of parameters.")
    device = trained[0].device
    with _only_these_learn(network, trained), _seeded(seed, device):
        optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
        network.train()
        state = {**named, **dict(network.named_buffers())}
        losses = [] if kept is None else restore_state(kept, state, optimizer, device)
        for step, batch in enumerate(islice(batches, len(losses), schedule.steps), start=len(losses)):
            progress(stage, step, schedule.steps, "steps")
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            with computing_in(precision, device, keeps_rounded=False):
                value = loss(network, tuple(tensor.to(device) for tensor in batch))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(trained, schedule.max_gradient_norm)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise UnmergeableError(f"{stage}: the loss is {losses[-1]} at step {step}; lower the learning rate.")
            optimizer.step()
            if kept is not None and (step + 1) % kept.every == 0:
                write_state(kept, state, optimizer, device, losses)
    network.eval()
    if len(losses) < schedule.steps:
        raise UsageError(f"{stage}: batches for {len(losses)} of {schedule.steps} steps; give more of them.")
    progress(stage, schedule.steps, schedule.steps, "steps")
    return losses


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Numbers of the examples of each batch, int64 [batch_size], without end: each epoch is a new order.

    Examples left over at the end of an epoch are skipped, so that every batch is full.

    Raises:
        UsageError: fewer examples than one batch holds.
    """
    if count < batch_size:
        raise UsageError(f"{count} examples do not fill a batch of {batch_size}; lower the batch size.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


@contextmanager
def _only_these_learn(network: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for the trained parameters alone; afterwards every flag is as before and no gradient is kept."""
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    chosen = set(trained)
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generator starts from ``seed`` inside and is restored outside."""
    devices = [] if device.type == "cpu" else [device]  # the CPU's generator is always among the restored
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed)
        yield
