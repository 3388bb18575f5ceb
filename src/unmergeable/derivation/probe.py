"""Which coordinate comes from which: derivatives between activations, and the places of a product's rows on disk.

support(x, y)[i, r]    whether coordinate i of x changes with coordinate r of y, at any token
rows(product)[r]       the tensor on disk, the axis and the place on it that coordinate r of its output comes from
columns(product)[i]    the same for coordinate i of its input
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Where one coordinate lies: ``place`` on ``axis`` of ``weight``, and the bias that goes with it.

    ``slice``: of a weight that holds several matrices along its first axis, the one.
    """

    weight: str
    axis: int
    place: int
    bias: str | None = None
    slice: int | None = None


@dataclass(frozen=True)
class Source:
    """An activation [..., tokens, coordinates]; ``outer`` where the axis before tokens (heads, experts) counts in."""

    tensor: Tensor
    outer: bool = False

    @property
    def width(self) -> int:
        return self.tensor.shape[-1] * (self.tensor.shape[-3] if self.outer else 1)

    def over_tokens(self, grad: Tensor) -> Tensor:
        """[directions, *activation] summed over all but coordinates: [directions, width]."""
        count, size = len(grad), self.tensor.shape[-1]
        if self.outer:
            return grad.reshape(count, -1, *self.tensor.shape[-3:]).sum((1, 3)).reshape(count, -1)
        return grad.reshape(count, -1, size).sum(1)


def output_of(product: Product) -> Source:
    """A product's output; that of experts side by side has a coordinate for each of each."""
    return Source(product.outputs, outer=product.weight.dim() > 2)


def support(
    target: Source, sources: Sequence[Source], *, first_token: bool = False, only: Sequence[int] | None = None
) -> list[Tensor]:
    """For each source, a boolean [coordinates of target, coordinates of source]: whether one changes with the other.

    Over all tokens, or at the first one alone; of the ``only`` coordinates of the target that are asked for, or all.
    """
    tensor = target.tensor
    if tensor.numel() == 0:  # an expert that no token was sent to
        count = target.width if only is None else len(only)
        return [torch.zeros(count, source.width, dtype=torch.bool) for source in sources]
    flat = _over_tokens(target, first_token=first_token)
    asked = flat if only is None else flat[list(only)]
    return [_nonzero(grad) for grad in _derivatives(asked, sources)]


def _over_tokens(target: Source, *, first_token: bool) -> Tensor:
    """The sum of ``target`` over tokens with random weights, or its first token: [coordinates]."""
    tensor = target.tensor
    tokens = tensor.shape[-2] if tensor.dim() > 1 else 1
    weights = torch.zeros(tokens, dtype=tensor.dtype)
    weights[0] = 1
    if not first_token:
        weights = torch.rand(tokens, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype) + 0.5
    summed = (tensor * weights[:, None]).sum(-2) if tensor.dim() > 1 else tensor
    return summed.reshape(-1, target.width).sum(0)


def derivatives(target: Source, factors: Sequence[Tensor]) -> list[Tensor]:
    """For each factor, how much each coordinate of ``target`` changes with each of its numbers, over all tokens.

    [coordinates of target, *shape of the factor], no less than zero; of a factor without influence, no coordinates.
    """
    if not factors or not target.tensor.requires_grad:
        return [torch.zeros(0, *factor.shape) for factor in factors]
    flat = _over_tokens(target, first_token=False)
    parts = [_gradients(flat, some, factors) for some in torch.eye(len(flat), dtype=flat.dtype).split(AT_A_TIME)]
    return [
        torch.cat([torch.zeros(0, *factor.shape) if grad is None else grad.abs() for grad in column])
        for factor, column in zip(factors, zip(*parts, strict=True), strict=True)
    ]


def one_to_one(table: Tensor) -> tuple[int, list[int]] | None:
    """The axis of a factor on which each coordinate changes with one place that no other does, and these places.

    ``table`` [coordinates, *shape of the factor]; None where there is no such axis.
    """
    for axis in range(table.dim() - 1 if len(table) else 0):
        own = _nonzero(table.movedim(axis + 1, 1).flatten(2).sum(2) if table.dim() > 2 else table)
        if bool((own.sum(1) == 1).all()) and bool((own.sum(0) <= 1).all()):
            return axis, own.int().argmax(1).tolist()
    return None


def reached(target: Tensor, sources: Sequence[Source], tokens: Sequence[int]) -> Tensor:
    """Whether ``target`` [..., tokens, coordinates] changes with a source at some tokens: boolean [tokens, sources]."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(target.shape, generator=generator, dtype=target.dtype) + 0.5
    flat = (target * weights).movedim(-2, 0).reshape(target.shape[-2], -1).sum(1)[list(tokens)]
    tables = [_nonzero(grad).any(1) for grad in _derivatives(flat, sources)]
    return torch.stack(tables, dim=1) if tables else torch.zeros(len(tokens), 0, dtype=torch.bool)


def _derivatives(flat: Tensor, sources: Sequence[Source]) -> list[Tensor]:
    """[coordinates of target, coordinates of source] for each source; tokens summed in absolute value."""
    if not sources or not flat.requires_grad:
        return [torch.zeros(len(flat), source.width, dtype=torch.float64) for source in sources]
    directions = torch.eye(len(flat), dtype=flat.dtype).split(AT_A_TIME)
    parts = [_along(flat, some, sources) for some in directions]
    return [torch.cat(found) for found in zip(*parts, strict=True)]


def _along(flat: Tensor, directions: Tensor, sources: Sequence[Source]) -> list[Tensor]:
    """The rows of :func:`_derivatives` for some directions [count, coordinates of target]."""
    found = _gradients(flat, directions, [source.tensor for source in sources])
    return [
        torch.zeros(len(directions), source.width, dtype=torch.float64)
        if grad is None
        else source.over_tokens(grad.abs())
        for grad, source in zip(found, sources, strict=True)
    ]


def _gradients(flat: Tensor, directions: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of ``flat`` along each of ``directions``, by each of ``inputs``: [directions, *input]; None where it has none."""
    try:
        return torch.autograd.grad(
            flat, inputs, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # some operations have no batched derivative
        single = [torch.autograd.grad(flat, inputs, row, retain_graph=True, allow_unused=True) for row in directions]
        return [None if column[0] is None else torch.stack(column) for column in zip(*single, strict=True)]


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

    def names_of(self, parameter: Tensor) -> list[str]:
        """The tensors on disk that are a parameter as a whole."""
        return [name for name, place in self._owned.get(id(parameter), []) if place.parameter is parameter]

    def rows(self, product: Product) -> list[Spot | None]:
        """Where each coordinate of the product's output lies; None where that is not one place of one axis."""
        inputs = _one_token(product)
        answer = product.replay(inputs)
        count = answer.shape[-1] * (answer.shape[0] if product.weight.dim() > 2 else 1)
        tags = torch.arange(1, count + 1, dtype=torch.float64)
        tagged = tags.reshape(answer.shape[0], 1, -1) if product.weight.dim() > 2 else tags
        spots = self._spots(product, (answer * tagged).sum(), count)
        added = product.added if len(product.added) == 1 and product.added[0][1].numel() == count else ()
        for owner, bias in added:
            (grad,) = torch.autograd.grad((bias * tags).sum(), owner)
            for name, every in self._tags(owner, grad):
                for index, along in _slices(every):
                    if along.dim() != 1:
                        continue
                    places = {int(tag) - 1: (index, place) for place, tag in enumerate(along.tolist())}
                    spots = [
                        replace(spot, bias=name) if spot and places.get(row) == (spot.slice, spot.place) else spot
                        for row, spot in enumerate(spots)
                    ]
        return spots

    def columns(self, product: Product) -> list[Spot | None]:
        """Where each coordinate of the product's input lies."""
        inputs = _one_token(product)
        count = inputs.numel()
        tagged = torch.arange(1, count + 1, dtype=torch.float64).reshape(inputs.shape)
        spots = self._spots(product, product.replay(tagged).sum(), count)
        return [spot and replace(spot, bias=None) for spot in spots]

    def _spots(self, product: Product, total: Tensor, count: int) -> list[Spot | None]:
        found = torch.autograd.grad(total, product.parameters, retain_graph=True, allow_unused=True)
        grads: list[Tensor | None] = list(found)
        spots: list[Spot | None] = [None] * count
        biases: dict[tuple[int, int | None, int], str] = {}
        for parameter, grad in zip(product.parameters, grads, strict=True):
            if grad is None:
                continue
            for name, every in self._tags(parameter, grad):
                for index, tags in _slices(every):
                    axis = _tagged_axis(tags)
                    if axis is None:
                        continue
                    along = tags.movedim(axis, 0).reshape(tags.shape[axis], -1).amax(1).long()
                    axis += index is not None
                    for place, tag in enumerate(along.tolist()):
                        if not 0 < tag <= count:
                            continue
                        if tags.dim() == 1:
                            biases[tag - 1, index, place] = name
                        else:
                            is_first = spots[tag - 1] is None
                            spots[tag - 1] = Spot(name, axis, place, slice=index) if is_first else None
        return [
            spot and replace(spot, bias=biases.get((row, spot.slice, spot.place))) for row, spot in enumerate(spots)
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


def _slices(tags: Tensor) -> list[tuple[int | None, Tensor]]:
    """The tags of a whole tensor; or those of each slice along its first axis that has any, with its number.

    The latter where tags lie on no one axis of the tensor, as of the experts that one tensor holds.
    """
    if tags.dim() < 2 or _tagged_axis(tags) is not None:
        return [(None, tags)]
    return [(index, tags[index]) for index in range(len(tags)) if bool(tags[index].any())]


def _tagged_axis(tags: Tensor) -> int | None:
    """The axis along which tags differ and beside which they are constant."""
    for axis in range(tags.dim()):
        moved = tags.movedim(axis, 0).reshape(tags.shape[axis], -1)
        if bool((moved == moved[:, :1]).all()) and bool((moved != 0).any()):
            return axis
    return None
