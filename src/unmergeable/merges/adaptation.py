"""Merges that follow the entropy of their own answers: numbers that make a merge, moved on unlabelled inputs.

Each step merges, lets the merge answer a batch of every task, each with its own head, and moves the numbers against the
gradient of the summed entropies, by Adam. That gradient follows from the one of the weights, which a backward pass
leaves behind anyway: the network runs on plain merged weights, and no graph through the merge is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.disk_weights import disk_gradients, find_places, show, swapped
from unmergeable.network.encoding import endless
from unmergeable.network.tasks import Task, device_of, entropy
from unmergeable.progress import Progress, silent

Entropies = tuple[tuple[float, ...], ...]
"""Of every task, in nats, on the batches of each step."""

Observe = Callable[[int, Any], None]
"""Told of a step, counted from 0, and of the network with the merge that the step starts from."""


@dataclass(frozen=True)
class Adaptation:
    """What is moved.

    Attributes:
        name: of the method, for messages.
        parameters: the numbers; Adam changes them in place.
        remerge: writes the merge they make into the same tensors each time, and returns them by their names on disk.
        gradients: from the loss's gradient by each weight to that by each of ``parameters``.
    """

    name: str
    parameters: Sequence[Tensor]
    remerge: Callable[[], Mapping[str, Tensor]]
    gradients: Callable[[Mapping[str, Tensor]], Sequence[Tensor]]

    def follow_entropy(
        self,
        network: Any,
        tasks: Sequence[Task],
        heads: Sequence[Mapping[str, Tensor]],
        *,
        learning_rate: float,
        steps: int,
        observe: Observe | None = None,
        progress: Progress = silent,
    ) -> Entropies:
        """Take ``steps`` steps of Adam down the summed entropies.

        Args:
            network: of the experts' architecture; it has its own weights again afterwards.
            tasks: labels are not read.
            heads: for each task tensors by their names on disk that stand in for the merged ones.
            learning_rate: of Adam.
            steps: to take.
            observe: told of every step.
            progress: told of the steps done.

        Raises:
            BadInput: a task has no examples, or answers that are not finite.
        """
        optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        streams = [endless(task.batches) for task in tasks]
        entropies: list[tuple[float, ...]] = []
        merge = self.remerge()
        with swapped(network, merge):
            places = find_places(network)
            for step in range(steps):
                show(places, self.remerge())
                if observe is not None:
                    observe(step, network)
                network.zero_grad(set_to_none=True)
                losses = []
                for task, head, stream in zip(tasks, heads, streams, strict=True):
                    show(places, head)
                    batch = next(stream).to(device_of(network))
                    loss = entropy(task.predict(network, batch).logits)
                    loss.backward()
                    losses.append(loss.item())
                    show(places, {name: merge[name] for name in head})
                entropies.append(tuple(losses))
                if not all(map(math.isfinite, losses)):
                    raise BadInput(
                        f"{self.name}: the entropies are {losses} at step {step}; use the networks in float32."
                    )
                for parameter, gradient in zip(self.parameters, self.gradients(disk_gradients(places)), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                progress(f"learning: {self.name}", step + 1, steps, "steps")
            network.zero_grad(set_to_none=True)
        return tuple(entropies)


def learnt_names(
    method: str, names: Sequence[str], known: Iterable[str], heads: Sequence[Mapping[str, Tensor]]
) -> list[str]:
    """The ``names`` that belong to no head.

    Raises:
        Mismatch: a head's tensor is not among the ``known``.
        UsageError: every tensor belongs to a head.
    """
    fixed = {name for head in heads for name in head}
    if unknown := sorted(fixed - set(known)):
        raise Mismatch(f"{unknown[0]}: a head's tensor that the base does not hold.")
    learnt = [name for name in names if name not in fixed]
    if not learnt:
        raise UsageError(f"{method}: every tensor belongs to a head; name fewer of them.")
    return learnt


def head_of(heads: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with one of ``heads``, beginnings separated by blanks.

    Raises BadInput when some are named and none is there.
    """
    beginnings = tuple(heads.split())
    head = {name: tensor for name, tensor in state.items() if beginnings and name.startswith(beginnings)}
    if beginnings and not head:
        raise BadInput(f"heads={heads}: no tensor begins so; `inspect` lists their names.")
    return head


def require_one_each(method: str, experts: int, **given: int) -> None:
    """Raise UsageError unless there is one of each kind for every expert: ``tasks=2, heads=2``."""
    for what, count in given.items():
        if count != experts:
            raise UsageError(f"{method}: {count} {what} for {experts} experts: give one each, in their order.")


def require_steps(*, learning_rate: float, steps: int, batch_size: int) -> None:
    """Raise UsageError for settings of the steps that are out of range."""
    if not 0 < learning_rate < torch.inf:
        raise UsageError(f"learning_rate={learning_rate}: must be positive.")
    if steps < 1 or batch_size < 1:
        raise UsageError(f"steps={steps}, batch_size={batch_size}: at least one of each is needed.")
