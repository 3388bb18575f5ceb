"""What goes into every linear layer of a network, as the second moments X^T X / rows that RegMean needs.

For a weight whose axis ``a`` meets the inputs (1 for ``nn.Linear``, 0 for GPT-2's ``Conv1D``) the Gram matrix is kept
under ``NAME/a``, NAME being the weight's name on disk. Dividing by the rows, tokens or patches, makes networks that saw
more data weigh no more. Weights that saving cuts or fuses, and those that are embeddings too, have none.

All layers are captured in one pass when their matrices fit ``memory_budget``; otherwise in as few passes as do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmergeable.errors import BadInput
from unmergeable.network.disk_weights import find_places
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Task, answer, device_of
from unmergeable.progress import Progress, silent

MEMORY_BUDGET = 4 << 30
"""Bytes of Gram matrices gathered at a time. One of 14 336 inputs takes 0.8 GB."""


@dataclass(frozen=True)
class LinearLayer:
    """A layer whose weight is one tensor on disk. ``axis`` of the weight meets the inputs."""

    name: str
    axis: int
    module: nn.Module

    @property
    def key(self) -> str:
        """The name of its Gram matrix."""
        return f"{self.name}/{self.axis}"

    @property
    def inputs(self) -> int:
        """How many numbers go in."""
        weight: Any = self.module.weight
        return int(weight.shape[self.axis])


def linear_layers(network: Any) -> tuple[LinearLayer, ...]:
    """The layers that have a Gram matrix, in the order of their keys."""
    owners: dict[int, tuple[int, nn.Module]] = {}
    embeddings = set()
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding):
            embeddings.add(id(weight))
        elif isinstance(module, nn.Linear):
            owners[id(weight)] = (1, module)
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            owners[id(weight)] = (0, module)
    layers = [
        LinearLayer(name, *owners[id(place.parameter)])
        for name, place in find_places(network).items()
        if id(place.parameter) in owners.keys() - embeddings
    ]
    return tuple(sorted(layers, key=lambda layer: layer.key))


@torch.no_grad()
def gather_input_grams(
    network: Any, task: Task, *, memory_budget: int = MEMORY_BUDGET, progress: Progress = silent
) -> Iterator[tuple[str, Tensor]]:
    """Key and Gram matrix, float32 [inputs, inputs], of every linear layer, in the order of :func:`linear_layers`.

    Only the batches of the task matter, not how its output is read. Padding does not count. Each matrix is the
    caller's to keep or drop before the next is asked for.

    Raises:
        BadInput: there are no examples, the network does not take them, or its activations are not finite.
    """
    layers = linear_layers(network)
    for group in _groups(layers, memory_budget):
        yield from _gather(network, task, group, progress).items()


def _groups(layers: Sequence[LinearLayer], memory_budget: int) -> Iterator[list[LinearLayer]]:
    group: list[LinearLayer] = []
    size = 0
    for layer in layers:
        nbytes = 4 * layer.inputs**2
        if group and size + nbytes > memory_budget:
            yield group
            group, size = [], 0
        group.append(layer)
        size += nbytes
    if group:
        yield group


def _gather(network: Any, task: Task, layers: Sequence[LinearLayer], progress: Progress) -> dict[str, Tensor]:
    device = device_of(network)
    sums = {layer.key: torch.zeros(layer.inputs, layer.inputs, device=device) for layer in layers}
    rows = dict.fromkeys(sums, 0)

    def add(key: str, inputs: Tensor) -> None:
        sums[key].addmm_(inputs.T, inputs)
        rows[key] += len(inputs)

    seen = 0
    for batch in task.batches:
        with _inputs_told(layers, batch, add):
            answer(network, batch.to(device))  # whatever it is: no head is needed
        seen += len(batch)
        progress(f"inputs of layers: {task.name}", seen, 0, "examples")  # of how many is not known
    if seen == 0:
        raise BadInput(f"{task.name}: no examples to send through the network; give some.")
    for key, total in sums.items():
        total.div_(max(1, rows[key]))  # a layer that is never called has no inputs
        if not bool(total.isfinite().all()):
            raise BadInput(f"{key.rpartition('/')[0]}: its inputs on {task.name} are not finite; use float32.")
    return sums


@contextmanager
def _inputs_told(
    layers: Sequence[LinearLayer], batch: EncodedBatch, told: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, ``told`` is given the key and the inputs, float32 [rows, inputs], of every layer that is called."""
    mask = batch.inputs.get("attention_mask")

    def capture(key: str, inputs: Tensor) -> None:
        if mask is not None and inputs.dim() == 3 and inputs.shape[:2] == mask.shape:
            inputs = inputs[mask.bool().to(inputs.device)]
        told(key, inputs.reshape(-1, inputs.shape[-1]).float())

    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(
                lambda module, arguments, key=layer.key: capture(key, arguments[0])
            )
            hooks.callback(hook.remove)
        yield
