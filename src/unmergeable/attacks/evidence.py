"""Numbers that tell of a protection, from gauges and from weights; ``signs.py`` says when one counts as a sign."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from unmergeable.architecture.symmetry import Role
from unmergeable.attacks.task_vectors import CHUNK_ELEMENTS
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import Gauge

VISIBLE = 0.01
"""Entries are looked at where half a unit in the last place is below this share of the tensor's mean change."""


def off_diagonal(gauges: Sequence[Gauge], roles: Sequence[Role]) -> float:
    """Share of the squared entries of all matrices of these roles that lies off their diagonals, from 0 to 1."""
    whole = diagonal = 0.0
    for element in _bases(gauges, roles):
        matrix = element.matrix()
        whole += float(matrix.square().sum())
        diagonal += float(torch.diagonal(matrix, dim1=1, dim2=2).square().sum())
    return 1 - diagonal / whole if whole else 0.0


def spread(gauges: Sequence[Gauge], roles: Sequence[Role]) -> float:
    """Root mean square of the logarithms of scales; a negative one counts as 1 more."""
    squares = count = 0.0
    for element in _bases(gauges, roles):
        scales = element.scale if isinstance(element, Monomial) else torch.diagonal(element.matrix(), dim1=1, dim2=2)
        logarithms = scales.abs().clamp(min=1e-30).log() + (scales < 0)
        squares, count = squares + float(logarithms.square().sum()), count + logarithms.numel()
    return math.sqrt(squares / count) if count else 0.0


def out_of_place(gauges: Sequence[Gauge], role: Role) -> float:
    """Share of the heads or hidden units that a permutation moves, from 0 to 1."""
    moved = count = 0
    for gauge in gauges:
        for name, space in gauge.spaces.items():
            element = gauge[name]
            if space.role == role and space.group.kind == "permutation" and isinstance(element, Monomial):
                moved += int((element.index != torch.arange(space.size)).sum())
                count += space.size
    return moved / count if count else 0.0


def reset_entries(checkpoint: TensorSource, base: TensorSource, name: str) -> tuple[int, int]:
    """How many entries equal the base's, and among how many a change of the usual size would show."""
    ours, theirs = checkpoint.tensor(name).flatten(), base.tensor(name).flatten()
    pieces = list(zip(ours.split(CHUNK_ELEMENTS), theirs.split(CHUNK_ELEMENTS), strict=True))
    change = math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in pieces) / max(1, ours.numel()))
    equal = visible = 0
    for x, y in pieces:
        half_unit = y.abs().double() * torch.finfo(y.dtype).eps / 2
        seen = half_unit < VISIBLE * change
        equal, visible = equal + int((seen & (x == y)).sum()), visible + int(seen.sum())
    return equal, visible


def _bases(gauges: Sequence[Gauge], roles: Sequence[Role]) -> Iterator[Element]:
    """The elements that are no permutations."""
    for gauge in gauges:
        for name, space in gauge.spaces.items():
            if space.role in roles and space.group.kind != "permutation":
                yield gauge[name]
