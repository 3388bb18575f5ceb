"""A network that is nothing but its weights, with a loss that can be worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmergeable.evaluation.analysis import Scored

State = dict[str, Tensor]


class Quadratic(nn.Module):
    """L = 1/2 sum of curvature * (weight - minimum)^2 over two tensors, in float64."""

    def __init__(self, curvature: State, minimum: State) -> None:
        super().__init__()
        self.curvature, self.minimum = curvature, minimum
        for name, tensor in minimum.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))

    def forward(self) -> Tensor:
        terms = [
            (self.curvature[name] * (weight - self.minimum[name]).square()).sum()
            for name, weight in self.named_parameters()
        ]
        return 0.5 * torch.stack(terms).sum()


def state(seed: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (7,), "second": (3, 4)}
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def quadratic(seed: int = 0) -> Quadratic:
    """Random curvatures between 1 and 3, random minimum."""
    curvature = {name: 1 + 2 * torch.sigmoid(tensor) for name, tensor in state(seed + 100).items()}
    return Quadratic(curvature, state(seed))


@torch.no_grad()
def score(network: Quadratic) -> Scored:
    """The loss; the credit is the loss again, negated, to tell them apart."""
    loss = float(network())
    return Scored(loss, -loss)


def backpropagate(network: Quadratic) -> float:
    network.zero_grad(set_to_none=True)
    loss: Tensor = network()
    loss.backward()
    return float(loss.detach())


def inner(first: State, second: State, by: State | None = None) -> float:
    """<first, second>, weighted entry by entry."""
    return sum(float((first[name] * second[name] * (1 if by is None else by[name])).sum()) for name in first)


def minus(first: State, second: State) -> State:
    return {name: first[name] - second[name] for name in first}
