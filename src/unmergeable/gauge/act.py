"""One tensor under a gauge, in place and in bounded memory: the only place where weights are transformed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unmergeable.architecture.symmetry import Leg, Space, SymmetryMap
from unmergeable.gauge.elements import Element
from unmergeable.gauge.gauge import Gauge

CHUNK_ELEMENTS = 1 << 20
"""Numbers transformed at a time: 8 MiB in float64, which is about what a processor's cache holds."""


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """What weights of a stored dtype are transformed in: float64, or float32 for the 16-bit formats.

    There float32 adds an error of 2^-24 times the condition number to one of 2^-9 (bfloat16) or 2^-12 (float16) from
    rounding the result, and takes half the time.
    """
    return torch.float32 if stored in (torch.bfloat16, torch.float16) else torch.float64


def edits(symmetry: SymmetryMap, gauges: Sequence[Gauge]) -> dict[str, Callable[[Tensor], Tensor]]:
    """For every tensor the gauges touch, the function that transforms it (in place) and returns it."""

    def edit(name: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: act_(tensor, name, symmetry, gauges)

    touched = {space for gauge in gauges for space in gauge.spaces}
    return {name: edit(name) for name in symmetry.tensors_of(touched)}


def act_(tensor: Tensor, name: str, symmetry: SymmetryMap, gauges: Sequence[Gauge]) -> Tensor:
    """Transform ``tensor`` (stored dtype, any shape) in place by each gauge in turn, and return it.

    Everything is applied in :func:`compute_dtype` and rounded once. Memory beyond the tensor and the elements is at
    most three chunks: a piece, its image and one temporary. A tensor with legs on several axes is one piece.
    """
    if tensor.numel() == 0:
        return tensor
    steps: list[tuple[Leg, Element]] = []
    for gauge in gauges:
        legs = [leg for leg in symmetry.legs[name] if leg.space in gauge]
        elements = {leg.space: gauge[leg.space] for leg in legs}
        steps += [(leg, elements[leg.space]) for leg in (reversed(legs) if gauge.is_inverse else legs)]
    offset = symmetry.gain_offset.get(name, 0.0)
    for piece in _pieces(tensor, {leg.axis for leg, _ in steps}):
        work = piece.to(compute_dtype(tensor.dtype)).contiguous()
        if offset:
            work += offset
        for leg, element in steps:
            coordinates = leg_view(work, leg, symmetry.spaces[leg.space])
            coordinates.copy_(element.apply(coordinates, leg.variance))
        if offset:
            work -= offset
        piece.copy_(work)
    return tensor


def leg_view(tensor: Tensor, leg: Leg, space: Space) -> Tensor:
    """The coordinates of a leg, as a view [outer, blocks, *spectators, size, inner] of a contiguous tensor."""
    assert tensor.is_contiguous()
    length = tensor.shape[leg.axis]
    outer, inner = math.prod(tensor.shape[: leg.axis]), math.prod(tensor.shape[leg.axis + 1 :])
    counts, strides = [count for count, _ in leg.spectators], [stride for _, stride in leg.spectators]
    return torch.as_strided(
        tensor,
        (outer, space.blocks, *counts, space.size, inner),
        (
            length * inner,
            leg.block_stride * inner,
            *(stride * inner for stride in strides),
            leg.element_stride * inner,
            1,
        ),
        tensor.storage_offset() + leg.offset * inner,
    )


def _pieces(tensor: Tensor, axes: set[int]) -> Iterator[Tensor]:
    """Views that cover the tensor, each whole along ``axes`` and of at most about CHUNK_ELEMENTS numbers."""
    if tensor.numel() <= CHUNK_ELEMENTS or len(axes) > 1:
        yield tensor
        return
    (axis,) = axes
    free = [dimension for dimension in range(tensor.dim()) if dimension != axis]
    if not free:
        yield tensor
        return
    along = max(free, key=lambda dimension: tensor.shape[dimension])
    step = max(1, CHUNK_ELEMENTS * tensor.shape[along] // tensor.numel())
    for start in range(0, tensor.shape[along], step):
        yield tensor.narrow(along, start, min(step, tensor.shape[along] - start))


def transform_all(tensors: Mapping[str, Tensor], symmetry: SymmetryMap, gauges: Sequence[Gauge]) -> dict[str, Tensor]:
    """Transformed copies of a whole set of tensors, for tests and small models."""
    edit = edits(symmetry, gauges)
    return {name: edit[name](tensor.clone()) if name in edit else tensor for name, tensor in tensors.items()}
