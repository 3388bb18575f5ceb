"""The coefficients of AdaMerging, learnt from unlabelled data with a live network (arXiv 2310.02575).

Each step merges, lets the merge answer a batch of every task, and moves the coefficients against the gradient of the
summed entropies. That gradient follows from the one of the weights, which a backward pass leaves behind anyway:

    d loss / d lambda_i^l = < d loss / d theta^l, tau_i^l >

So the network runs on plain merged weights, written in place, and no graph through the merge is kept: beside the task
vectors memory holds one merged network and its gradient, for any number of coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges import AdaMerging
from unmergeable.network.disk_weights import disk_gradients, find_places, show, swapped
from unmergeable.network.encoding import endless
from unmergeable.network.task_vectors import TaskVectors
from unmergeable.network.tasks import Task, device_of, entropy
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class LearntCoefficients:
    """``coefficients`` of the experts by tensor; ``entropies`` of the tasks, in nats, on the batches of each step."""

    coefficients: Mapping[str, tuple[float, ...]]
    entropies: tuple[tuple[float, ...], ...]


Observe = Callable[[int, Any], None]
"""Told of a step, counted from 0, and of the network with the merge that the step starts from."""


def learn_coefficients(
    network: Any,
    task_vectors: TaskVectors,
    tasks: Sequence[Task],
    method: AdaMerging,
    *,
    start: Sequence[float] | None = None,
    heads: Sequence[Mapping[str, Tensor]] | None = None,
    observe: Observe | None = None,
    progress: Progress = silent,
) -> LearntCoefficients:
    """Learn how much of each expert to add in each tensor.

    Args:
        network: of the experts' architecture; it has its own weights again afterwards.
        task_vectors: of the experts, plain: ``method`` says whether signs are elected.
        tasks: one for each expert, in their order; labels are not read.
        method: granularity, steps and rates.
        start: a coefficient per expert; ``method.start`` for all if None.
        heads: for each task tensors by their names on disk that stand in for the merged ones; they are not learnt.
        observe: told of every step.
        progress: told of the steps done.

    Raises:
        UsageError: another number of tasks, heads or coefficients than of experts; a coefficient that starts outside
            [0, 1]; nothing but heads.
        Mismatch: a head that the network does not have.
        BadInput: a task has no examples, or answers that are not finite.
    """
    vectors = task_vectors if method.task_vectors == "plain" else task_vectors.elected(method.density)
    count = len(vectors.vectors)
    start = [method.start] * count if start is None else start
    heads = [{} for _ in tasks] if heads is None else heads
    for what, given in (("tasks", len(tasks)), ("heads", len(heads)), ("coefficients", len(start))):
        if given != count:
            raise UsageError(f"adamerging: {given} {what} for {count} experts: give one each, in their order.")
    if not all(0 <= value <= 1 for value in start):
        raise UsageError(f"adamerging: the coefficients {tuple(start)} must start in [0, 1], where they are kept.")
    fixed = {name for head in heads for name in head}
    if unknown := sorted(fixed - vectors.base.keys()):
        raise Mismatch(f"{unknown[0]}: a head's tensor that the base does not hold.")
    learnt = [name for name in vectors.names if name not in fixed]
    if not learnt:
        raise UsageError("adamerging: every tensor belongs to a head; name fewer of them.")
    rows = {name: number if method.granularity == "layer" else 0 for number, name in enumerate(learnt)}
    coefficients = torch.tensor([start] * (max(rows.values()) + 1), dtype=torch.float64)
    optimizer = torch.optim.Adam([coefficients], lr=method.learning_rate)

    def used(name: str) -> tuple[float, ...]:
        return tuple(coefficients[rows[name]].clamp(0, 1).tolist()) if name in rows else (0.0,) * count

    merge = vectors.merged(used)
    streams = [endless(task.batches) for task in tasks]
    entropies: list[tuple[float, ...]] = []
    with swapped(network, merge):
        places = find_places(network)
        for step in range(method.steps):
            show(places, vectors.merged(used, into=merge))
            if observe is not None:
                observe(step, network)
            network.zero_grad(set_to_none=True)
            found = []
            for task, head, stream in zip(tasks, heads, streams, strict=True):
                show(places, head)
                batch = next(stream).to(device_of(network))
                loss = entropy(task.predict(network, batch).logits)
                loss.backward()
                found.append(loss.item())
                show(places, {name: merge[name] for name in head})
            entropies.append(tuple(found))
            if not all(map(math.isfinite, found)):
                raise BadInput(f"adamerging: the entropies are {found} at step {step}; use the networks in float32.")
            coefficients.grad = _gradient(disk_gradients(places), vectors, rows, coefficients)
            optimizer.step()
            progress("learning coefficients", step + 1, method.steps, "steps")
        network.zero_grad(set_to_none=True)
    return LearntCoefficients({name: used(name) for name in vectors.names}, tuple(entropies))


def _gradient(
    gradients: Mapping[str, Tensor], vectors: TaskVectors, rows: Mapping[str, int], coefficients: Tensor
) -> Tensor:
    """Of the loss by each coefficient, [rows, experts]; 0 where one is held at the end of its range."""
    gradient = torch.zeros_like(coefficients)
    for name, row in rows.items():
        flat = gradients[name].reshape(-1)
        for expert, vector in enumerate(vectors.vectors):
            gradient[row, expert] += torch.dot(flat, vector[name].reshape(-1).to(flat)).double()
    # As through torch.clamp: nothing comes back from outside the range.
    return gradient.where((coefficients >= 0) & (coefficients <= 1), 0.0)
