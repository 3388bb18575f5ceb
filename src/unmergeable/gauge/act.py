"""One tensor under a gauge, in place and in bounded memory: the only place where weights are transformed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from unmergeable.architecture.symmetry import Leg, Space, Stack, SymmetryMap
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import Gauge

_Step = tuple[Leg, Element]

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


def origins(symmetry: SymmetryMap, gauges: Sequence[Gauge]) -> dict[str, str]:
    """For every tensor that takes another one's place in its stack, the name under which that one is stored."""
    found: dict[str, str] = {}
    for stack in symmetry.stacks:
        places = list(range(len(stack.members)))
        for gauge in gauges:
            moves = _places_before(stack, symmetry, gauge)
            places = [places[place] for place in moves]
        found |= {stack.members[now]: stack.members[then] for now, then in enumerate(places) if now != then}
    return found


def _places_before(stack: Stack, symmetry: SymmetryMap, gauge: Gauge) -> list[int]:
    """For each place in a stack, the place its tensor had before: the stack of the numbers 0, 1, 2 ... transformed."""
    places = torch.arange(len(stack.members), dtype=torch.float64)
    for leg, element in _steps(stack.legs, gauge):
        coordinates = leg_view(places, leg, symmetry.spaces[leg.space])
        coordinates.copy_(element.apply(coordinates, leg.variance))
    return [int(place) for place in places]


def _steps(legs: tuple[Leg, ...], gauge: Gauge) -> list[tuple[Leg, Element]]:
    own = [leg for leg in legs if leg.space in gauge]
    elements = {leg.space: gauge[leg.space] for leg in own}
    return [(leg, elements[leg.space]) for leg in (reversed(own) if gauge.is_inverse else own)]


def _route(name: str, symmetry: SymmetryMap, gauges: Sequence[Gauge]) -> list[tuple[Leg, Element]]:
    """What acts in turn on the tensor that ends as ``name``: it has another name before its stack is reordered."""
    stack = symmetry.stack_of.get(name)
    steps: list[tuple[Leg, Element]] = []
    for gauge in reversed(gauges):
        before = name
        if stack is not None:
            before = stack.members[_places_before(stack, symmetry, gauge)[stack.members.index(name)]]
        # Legs act before the tensor moves, and in an inverse after it has moved back.
        steps = _steps(symmetry.legs[name if gauge.is_inverse else before], gauge) + steps
        name = before
    return steps


def act_(tensor: Tensor, name: str, symmetry: SymmetryMap, gauges: Sequence[Gauge]) -> Tensor:
    """Transform ``tensor`` (stored dtype, any shape) in place by each gauge in turn, and return it.

    ``name`` is that of the result; for one that moves in its stack, ``tensor`` is the one :func:`origins` names.

    Everything is applied in :func:`compute_dtype` and rounded once. Memory beyond the tensor and the elements is at
    most three chunks: a piece, its image and one temporary; for a tensor with legs on several axes, a whole copy in
    the dtype of computing besides.
    """
    steps = _route(name, symmetry, gauges)
    if not steps or tensor.numel() == 0:
        return tensor
    offset = symmetry.gain_offset.get(name, 0.0)
    for part, own in _apart(tensor, steps):
        for piece in _pieces(part, {leg.axis for leg, _ in own}):
            work = piece.to(compute_dtype(tensor.dtype)).contiguous()
            if offset:
                work += offset
            for (index, axis), run in groupby(own, key=lambda step: (step[0].slice, step[0].axis)):
                _act_along(work if index is None else work[index], axis - (index is not None), list(run), symmetry)
            if offset:
                work -= offset
            piece.copy_(work)
    return tensor


def _apart(tensor: Tensor, steps: Sequence[_Step]) -> Iterator[tuple[Tensor, list[_Step]]]:
    """Views of a tensor, in turn, with the steps that act on each: its slices one by one, and all of it.

    Only all of it where numbers would be rounded more than once.
    """
    runs = [(is_sliced, list(run)) for is_sliced, run in groupby(steps, key=lambda step: step[0].slice is not None)]
    is_exact = all(isinstance(element, Monomial) and element.is_unscaled for leg, element in steps if leg.slice is None)
    if not (is_exact and sum(is_sliced for is_sliced, _ in runs) == 1):
        yield tensor, list(steps)
        return
    for is_sliced, run in runs:
        if not is_sliced:
            yield tensor, run
            continue
        by_slice: dict[int, list[_Step]] = {}
        for leg, element in run:
            assert leg.slice is not None
            by_slice.setdefault(leg.slice, []).append((replace(leg, axis=leg.axis - 1, slice=None), element))
        yield from ((tensor[index], own) for index, own in by_slice.items())


def _act_along(work: Tensor, axis: int, steps: Sequence[tuple[Leg, Element]], symmetry: SymmetryMap) -> None:
    """Apply steps on one axis to a contiguous tensor, a piece at a time."""
    for piece in _pieces(work, {axis}):
        part = piece.contiguous()
        for leg, element in steps:
            coordinates = _view(part, leg, axis, symmetry.spaces[leg.space])
            coordinates.copy_(element.apply(coordinates, leg.variance))
        if part is not piece:
            piece.copy_(part)


def leg_view(tensor: Tensor, leg: Leg, space: Space) -> Tensor:
    """The coordinates of a leg, as a view [outer, blocks, *spectators, size, inner] of a contiguous tensor."""
    if leg.slice is not None:
        return _view(tensor[leg.slice], leg, leg.axis - 1, space)
    return _view(tensor, leg, leg.axis, space)


def _view(tensor: Tensor, leg: Leg, axis: int, space: Space) -> Tensor:
    assert tensor.is_contiguous()
    length = tensor.shape[axis]
    outer, inner = math.prod(tensor.shape[:axis]), math.prod(tensor.shape[axis + 1 :])
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
    edit, origin = edits(symmetry, gauges), origins(symmetry, gauges)
    return {
        name: edit[name](tensors[origin.get(name, name)].clone()) if name in edit else tensor
        for name, tensor in tensors.items()
    }
