"""The linear layers of a network whose weight is one tensor on disk.

For a weight whose axis ``a`` meets the inputs (1 for ``nn.Linear``, 0 for GPT-2's ``Conv1D``) what is gathered of its
inputs is kept under ``NAME/a``, NAME being the weight's name on disk. Weights that saving cuts or fuses, and those that
are embeddings too, are none of these layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from unmergeable.network.disk_weights import find_places

MEMORY_BUDGET = 4 << 30
"""Bytes of matrices of second moments gathered at a time. One of 14 336 inputs takes 0.8 GB."""


@dataclass(frozen=True)
class LinearLayer:
    """A layer whose weight is one tensor on disk. ``axis`` of the weight meets the inputs."""

    name: str
    axis: int
    module: nn.Module

    @property
    def key(self) -> str:
        """The name of what is gathered of its inputs."""
        return f"{self.name}/{self.axis}"

    @property
    def inputs(self) -> int:
        """How many numbers go in."""
        weight: Any = self.module.weight
        return int(weight.shape[self.axis])


def linear_layers(network: Any) -> tuple[LinearLayer, ...]:
    """All of them, in the order of their keys."""
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
