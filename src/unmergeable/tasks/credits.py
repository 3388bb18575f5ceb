"""Credit and loss example by example: what a score is the mean of, and what a bootstrap draws from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import select
from unmergeable.network.tasks import Predict, Prediction, Task, device_of, predict
from unmergeable.tasks.task_kind import Scores


def example_credits(network: Any, task: Task) -> Scores:
    """For each example the fraction of its choices that are right, float64 [examples] in the order of the batches.

    A classifier chooses once per example, and the credit is 0 or 1. A language model chooses each token of a text.

    Raises:
        BadInput: the data have no labels, or a text is too short to choose anything.
    """
    return _means(network, task, lambda choices: choices.logits.argmax(dim=-1) == choices.require_targets())


def example_losses(network: Any, task: Task) -> Scores:
    """For each example the mean cross-entropy of its choices in nats, float64 [examples]. Raises the same."""
    return _means(
        network,
        task,
        lambda choices: functional.cross_entropy(choices.logits.double(), choices.require_targets(), reduction="none"),
    )


@dataclass(frozen=True)
class ChoiceScorer:
    """Scores the choices of a task that is a :class:`unmergeable.network.tasks.Task`."""

    task: Task

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.task.batches)

    def only(self, start: int, stop: int) -> ChoiceScorer:
        """Batches are cut where they reach beyond; texts keep the padding that they have."""
        batches, first = [], 0
        for batch in self.task.batches:
            inside = slice(max(start - first, 0), max(stop - first, 0))
            first += len(batch)
            if len(cut := batch.cut(inside)):
                batches.append(cut)
        return ChoiceScorer(replace(self.task, batches=batches))

    def credits(self, network: Any) -> Scores:
        """See :func:`example_credits`."""
        return example_credits(network, self.task)

    def losses(self, network: Any) -> Scores:
        """See :func:`example_losses`."""
        return example_losses(network, self.task)


GROUP = 12
"""Texts of like length that are computed together."""

WORTHWHILE = 0.8
"""Share of a batch's tokens, padding among them, that its groups may have together; with more it stays one."""

_Measure = Callable[[Prediction], Tensor]
"""Of choices, one number each: [choices]."""


@torch.no_grad()
def _means(network: Any, task: Task, measure: _Measure) -> Scores:
    device = device_of(network)
    return np.concatenate([_by_length(network, batch.to(device), task, measure) for batch in task.batches])


def _by_length(network: Any, batch: EncodedBatch, task: Task, measure: _Measure) -> Scores:
    """A batch in groups of texts of like length, so that short ones are not computed at the length of the longest."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool((mask[:, 1:] > mask[:, :-1]).any()):
        return _of_batch(network, batch, task, measure)  # padding on the left would move positions
    lengths, order = mask.sum(dim=1).cpu().sort(stable=True)
    widths = [int(group[-1]) * len(group) for group in lengths.split(GROUP)]
    if sum(widths) > WORTHWHILE * mask.numel():
        return _of_batch(network, batch, task, measure)
    found = np.empty(len(batch))
    found[order.numpy()] = np.concatenate(
        [_of_batch(network, select(batch, rows), task, measure) for rows in order.split(GROUP)]
    )
    return found


def _of_batch(network: Any, batch: EncodedBatch, task: Task, measure: _Measure) -> Scores:
    prediction = task.predict(network, batch)
    values = measure(prediction).double()
    counts = _choices_of_each(batch, len(values), task.predict)
    if counts is None:
        return np.concatenate([_of_batch(network, single, task, measure) for single in batch.singles()])
    if min(counts) == 0:
        raise BadInput(f"{task.name}: a text of one token leaves nothing to predict; leave it out.")
    return np.array([float(part.mean()) for part in values.split(counts)])


def _choices_of_each(batch: EncodedBatch, choices: int, how: Predict) -> list[int] | None:
    """How many choices each example has; None when that is not known from a batch of several."""
    if choices == len(batch):
        return [1] * choices
    if len(batch) == 1:
        return [choices]
    mask = batch.inputs.get("attention_mask")
    if how is predict and mask is not None:  # a language model: each token that follows a token
        return [int(count) for count in (mask[:, :-1] * mask[:, 1:]).sum(dim=1)]
    return None
