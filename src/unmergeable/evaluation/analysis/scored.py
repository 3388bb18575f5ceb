"""What a network scores: its mean loss and the share of choices that are right; and the gradient of that loss.

Analyses take a :data:`Score` and know nothing of tasks, so that a test can hand them a function it can solve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Task, device_of


class Scored(NamedTuple):
    """``loss``: mean cross-entropy in nats. ``credit``: share of right choices, in [0, 1]."""

    loss: float
    credit: float


Score = Callable[[Any], Scored]
"""A live network, with whatever weights it has at the time, to what it scores."""

Backpropagate = Callable[[Any], float]
"""Leaves the gradient of the network's mean loss in its parameters' ``grad``, and returns that loss."""


@torch.no_grad()
def score_task(network: Any, task: Task) -> Scored:
    """Mean cross-entropy and accuracy over all choices of a task.

    Raises:
        BadInput: the data have no labels, or there are no examples.
    """
    loss, right, count = 0.0, 0, 0
    for batch in task.batches:
        logits, targets = _choices(network, batch, task)
        loss += float(_cross_entropy(logits, targets))
        right += int((logits.argmax(dim=-1) == targets).sum())
        count += len(targets)
    _require_examples(task, count)
    return Scored(loss / count, right / count)


def backpropagate_task(network: Any, task: Task) -> float:
    """The mean cross-entropy over all choices, with its gradient in the parameters' ``grad``; what was there is lost.

    Raises:
        BadInput: the data have no labels, or there are no examples.
    """
    network.zero_grad(set_to_none=True)
    loss, count = 0.0, 0
    for batch in task.batches:
        logits, targets = _choices(network, batch, task)
        total = _cross_entropy(logits, targets)
        total.backward()
        loss += float(total.detach())
        count += len(targets)
    _require_examples(task, count)
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad /= count
    return loss / count


def _choices(network: Any, batch: EncodedBatch, task: Task) -> tuple[Tensor, Tensor]:
    prediction = task.predict(network, batch.to(device_of(network)))
    return prediction.logits, prediction.require_targets()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over choices, in nats; 16-bit logits are widened first."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets, reduction="sum")


def _require_examples(task: Task, count: int) -> None:
    if count == 0:
        raise BadInput(f"{task.name}: no examples to score; give some.")
