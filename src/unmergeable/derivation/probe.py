"""Which coordinate comes from which: derivatives between activations, and the places of a product's rows on disk.

support(x, y)[i, r]    whether coordinate i of x changes with coordinate r of y, at any token
rows(product)[r]       the tensor on disk, the axis and the place on it that coordinate r of its output comes from
columns(product)[i]    the same for coordinate i of its input
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.derivation.watch import Product
from unmergeable.network.disk_weights import Place, find_places

NEGLIGIBLE = 1e-10
"""A derivative this small beside the largest one is rounding."""


AT_A_TIME = 64
"""Derivatives computed side by side."""


@dataclass(frozen=True)
class Spot:
    """Where one coordinate lies: ``place`` on ``axis`` of ``weight``, and the bias that goes with it."""

    weight: str
    axis: int
    place: int
    bias: str | None = None


def support(
    target: Tensor, sources: Sequence[Tensor], *, heads: bool = False, first_token: bool = False
) -> list[Tensor]:
    """For each source, a boolean [coordinates of target, coordinates of source].

    Coordinates are the last axis; with ``heads``, the last axis within the one before the tokens [..., heads, tokens,
    size]. Sources with three axes or more and a first one longer than 1 (experts, heads) count that axis in as well.
    """
    if target.numel() == 0:  # an expert that no token was sent to
        return [torch.zeros(target.shape[-1], _width(source), dtype=torch.bool) for source in sources]
    weights = torch.zeros(target.shape[-2] if target.dim() > 1 else 1, dtype=target.dtype)
    weights[0] = 1
    if not first_token:
        weights = torch.rand(weights.shape, generator=torch.Generator().manual_seed(3), dtype=target.dtype) + 0.5
    summed = (target * weights[:, None]).sum(-2) if target.dim() > 1 else target
    flat = summed.reshape(-1) if heads else summed.reshape(-1, summed.shape[-1]).sum(0)
    grads = _derivatives(flat, sources)
    return [_nonzero(grad) for grad in grads]


def _derivatives(flat: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """[coordinates of target, coordinates of source] for each source; tokens summed in absolute value."""
    if not sources or not flat.requires_grad:
        return [torch.zeros(len(flat), _width(source), dtype=torch.float64) for source in sources]
    directions = torch.eye(len(flat), dtype=flat.dtype).split(AT_A_TIME)
    parts = [_along(flat, some, sources) for some in directions]
    return [torch.cat(found) for found in zip(*parts, strict=True)]


def _along(flat: Tensor, directions: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """The rows of :func:`_derivatives` for some directions [count, coordinates of target]."""
    inputs = list(sources)
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(
            flat, inputs, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # some operations have no batched derivative
        single = [torch.autograd.grad(flat, inputs, row, retain_graph=True, allow_unused=True) for row in directions]
        found = [None if column[0] is None else torch.stack(column) for column in zip(*single, strict=True)]
    return [
        torch.zeros(len(directions), _width(source), dtype=torch.float64)
        if grad is None
        else _over_tokens(grad.abs(), source)
        for grad, source in zip(found, sources, strict=True)
    ]


def _counts_first(source: Tensor) -> bool:
    return source.dim() >= 3 and source.shape[-3] > 1


def _width(source: Tensor) -> int:
    return source.shape[-1] * (source.shape[-3] if _counts_first(source) else 1)


def _over_tokens(grad: Tensor, source: Tensor) -> Tensor:
    if _counts_first(source):
        outer = grad.reshape(len(grad), -1, *source.shape[-3:]).sum((1, 3))
        return outer.reshape(len(grad), -1)
    return grad.reshape(len(grad), -1, source.shape[-1]).sum(1)


def _nonzero(grad: Tensor) -> Tensor:
    return grad > NEGLIGIBLE * grad.max().clamp_min(1e-300)


class Disk:
    """The places of a network's parameters on disk."""

    def __init__(self, network: Any) -> None:
        self.places: Mapping[str, Place] = find_places(network)
        self._owned: dict[int, list[tuple[str, Place]]] = {}
        for name, place in self.places.items():
            for piece in place.pieces:
                self._owned.setdefault(id(piece.parameter), []).append((name, place))

    def rows(self, product: Product) -> list[Spot | None]:
        """Where each coordinate of the product's output lies; None where that is not one place of one axis."""
        inputs = _one_token(product)
        answer = product.replay(inputs)
        count = answer.shape[-1] * (answer.shape[0] if product.weight.dim() > 2 else 1)
        tags = torch.arange(1, count + 1, dtype=torch.float64)
        tagged = tags.reshape(answer.shape[0], 1, -1) if product.weight.dim() > 2 else tags
        spots = self._spots(product, (answer * tagged).sum(), count)
        for bias in product.added if len(product.added) == 1 and product.added[0].numel() == count else ():
            for name, along in self._tags(bias, tags):
                places = {int(tag) - 1: place for place, tag in enumerate(along.tolist())}
                spots = [
                    Spot(spot.weight, spot.axis, spot.place, name) if spot and places.get(row) == spot.place else spot
                    for row, spot in enumerate(spots)
                ]
        return spots

    def columns(self, product: Product) -> list[Spot | None]:
        """Where each coordinate of the product's input lies."""
        inputs = _one_token(product)
        count = inputs.numel()
        tagged = torch.arange(1, count + 1, dtype=torch.float64).reshape(inputs.shape)
        spots = self._spots(product, product.replay(tagged).sum(), count)
        return [spot and Spot(spot.weight, spot.axis, spot.place) for spot in spots]

    def _spots(self, product: Product, total: Tensor, count: int) -> list[Spot | None]:
        grads: Sequence[Tensor | None]
        grads = torch.autograd.grad(total, product.parameters, retain_graph=True, allow_unused=True)
        spots: list[Spot | None] = [None] * count
        biases: dict[tuple[int, int], str] = {}
        for parameter, grad in zip(product.parameters, grads, strict=True):
            if grad is None:
                continue
            for name, tags in self._tags(parameter, grad):
                axis = _tagged_axis(tags)
                if axis is None:
                    continue
                along = tags.movedim(axis, 0).reshape(tags.shape[axis], -1).amax(1).long()
                for place, tag in enumerate(along.tolist()):
                    if not 0 < tag <= count:
                        continue
                    if tags.dim() == 1:
                        biases[tag - 1, place] = name
                    else:
                        spots[tag - 1] = None if spots[tag - 1] is not None else Spot(name, axis, place)
        return [
            spot and Spot(spot.weight, spot.axis, spot.place, biases.get((index, spot.place)))
            for index, spot in enumerate(spots)
        ]

    def _tags(self, parameter: Tensor, grad: Tensor) -> list[tuple[str, Tensor]]:
        """A parameter's numbers as they lie in each of its tensors on disk, zero elsewhere."""
        found = []
        for name, place in self._owned.get(id(parameter), []):
            values = torch.zeros(place.shape.numel(), dtype=grad.dtype)
            for piece in place.pieces:
                if piece.parameter is not parameter:
                    continue
                if piece.inside is None:
                    values = grad.reshape(-1)
                else:
                    values[piece.on_disk] = grad.reshape(-1)[piece.inside]
            found.append((name, values.reshape(place.shape)))
        return found


def _one_token(product: Product) -> Tensor:
    """Ones in the shape of one token's input; for experts side by side, one token for each."""
    width = product.inputs.shape[-1]
    shape = (product.weight.shape[0], 1, width) if product.weight.dim() > 2 else (1, width)
    return torch.ones(shape, dtype=torch.float64)


def _tagged_axis(tags: Tensor) -> int | None:
    """The axis along which tags differ and beside which they are constant."""
    for axis in range(tags.dim()):
        moved = tags.movedim(axis, 0).reshape(tags.shape[axis], -1)
        if bool((moved == moved[:, :1]).all()) and bool((moved != 0).any()):
            return axis
    return None
