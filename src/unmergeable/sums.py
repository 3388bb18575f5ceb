"""Sums of squares of weights in float64, a piece at a time: a copy of a whole tensor costs more than the sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 18
"""Numbers in float64 at a time, 2 MiB: they stay in a processor's cache, and their memory is used again."""


def pieces(*tensors: Tensor, flat: bool = True) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding pieces of tensors of one shape, in float64: along the first axis, or ``flat`` where they may be."""
    first = tensors[0]
    if flat and all(tensor.is_contiguous() for tensor in tensors):
        tensors, rows = tuple(tensor.reshape(-1) for tensor in tensors), PIECE
    else:
        rows = max(1, PIECE * first.shape[0] // max(1, first.numel()))
    for parts in zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True):
        yield tuple(part.double() for part in parts)


def squares(values: Tensor) -> float:
    """Of all numbers."""
    return sum(float(piece.square().sum()) for (piece,) in pieces(values))


def squares_along(values: Tensor, axis: int, factors: Tensor | None = None) -> Tensor:
    """For every coordinate of an axis the sum over all others: float64 [values.shape[axis]].

    Args:
        values: of any shape.
        axis: whose coordinates are kept.
        factors: of a matrix, by which the other axis is multiplied before, float64 [its length].
    """
    if values.dim() == 1:
        return values.double().square()
    length = values.shape[axis]
    found = torch.zeros(length, dtype=torch.float64)
    if axis % values.dim() == 0:
        step = max(1, PIECE * length // max(1, values.numel()))
        for start in range(0, length, step):
            piece = values[start : start + step].double()
            piece = piece if factors is None else piece * factors
            found[start : start + step] = piece.square().reshape(len(piece), -1).sum(1)
        return found
    kept = values.movedim(axis, -1)
    step = max(1, PIECE * len(kept) // max(1, kept.numel()))
    for start in range(0, len(kept), step):
        piece = kept[start : start + step].double()
        piece = piece if factors is None else piece * factors[start : start + step, None]
        found += piece.square().reshape(-1, length).sum(0)
    return found
