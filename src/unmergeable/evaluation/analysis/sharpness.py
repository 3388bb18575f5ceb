"""Sharpness: the highest loss in a ball around the weights, each tensor within a radius relative to its own norm.

    max over { ||E_W||_F <= radius * ||W||_F for every tensor W }  of  L(theta + E)  -  L(theta)

The worst case of sharpness-aware minimisation (Foret et al., arXiv 2010.01412), in the ball of adversarial weight
perturbation (Wu et al., arXiv 2004.05884), which does not change when a tensor is scaled. It is found by the ascent

    E_W  <-  radius * ||W||_F * G_W / ||G_W||_F,      G the gradient of L at theta + E

from E = 0. Its first step is that of SAM. Each step maximises the linear part of L over the ball, so that where L is
convex the loss never falls, and on a quadratic it is the power method (Journee et al., arXiv 0811.4724). What is found
is a lower bound of the maximum. Where a gradient vanishes, at a minimum, a random direction takes its place. The value
depends on the basis: measure the canonical weights too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.evaluation.analysis.scored import Backpropagate
from unmergeable.evaluation.records import Record
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.network.disk_weights import Place, disk_gradients, find_places, show, swapped
from unmergeable.randomness import Stream

RADII = (0.001, 0.002, 0.005)
STEPS = 5


@dataclass(frozen=True)
class Sharpness(Record):
    """``loss`` in the centre, and the sharpness: how far it ``rises[r]`` within ``radii[r]``, in nats."""

    loss: float
    radii: tuple[float, ...]
    rises: tuple[float, ...]

    @property
    def worst(self) -> tuple[float, ...]:
        """The highest loss within each radius, in nats."""
        return tuple(self.loss + rise for rise in self.rises)


def sharpness(
    network: Any,
    weights: Mapping[str, Tensor],
    backpropagate: Backpropagate,
    *,
    radii: Sequence[float] = RADII,
    steps: int = STEPS,
    seed: int = 0,
) -> Sharpness:
    """The highest loss that an ascent finds around ``weights``.

    Args:
        network: live; it has its own weights again afterwards, and no gradients.
        weights: the centre, by name on disk.
        backpropagate: the loss on the task looked at, and its gradient.
        radii: of the balls, relative to each tensor's norm.
        steps: of each ascent; every one costs a forward and a backward pass over the examples.
        seed: of the directions where the gradient vanishes.

    Raises:
        Mismatch: the weights do not belong to this network.
    """
    centre = TaskVectors.between(weights, []).base
    moved = [name for name, tensor in centre.items() if tensor.is_floating_point()]
    stream = Stream.from_seed(seed)
    reached = {}
    with swapped(network, centre):
        places = find_places(network)
        loss = backpropagate(network)
        start = _directions(places, moved, lambda name: _random_direction(centre[name], stream.child(name)))
        for radius in radii:
            reached[radius], direction = loss, start
            for _ in range(steps):
                show(places, {name: _moved(centre[name], along, radius) for name, along in direction.items()})
                reached[radius] = max(reached[radius], backpropagate(network))
                direction = _directions(places, moved, direction.__getitem__)
        network.zero_grad(set_to_none=True)
    # What an ascent found in a ball lies in every larger one too.
    worst = (max(found for smaller, found in reached.items() if smaller <= radius) for radius in radii)
    return Sharpness(loss, tuple(radii), tuple(highest - loss for highest in worst))


def _directions(
    places: Mapping[str, Place], names: Sequence[str], otherwise: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The gradient of every tensor, of norm 1; where it vanishes, another direction."""
    gradients = disk_gradients({name: places[name] for name in names})
    found = {}
    for name, gradient in gradients.items():
        norm = _norm(gradient)
        found[name] = otherwise(name) if norm == 0 else gradient / norm
    return found


def _moved(tensor: Tensor, direction: Tensor, radius: float) -> Tensor:
    return torch.add(tensor, direction.to(tensor), alpha=radius * _norm(tensor))


def _random_direction(tensor: Tensor, stream: Stream) -> Tensor:
    drawn = torch.from_numpy(stream.signs(tensor.numel())).reshape(tensor.shape)
    return (drawn / math.sqrt(max(1, tensor.numel()))).to(tensor)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
