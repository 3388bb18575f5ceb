"""What a nearest group element depends on: second moments of the coordinates of a space, protected against base.

For coordinates x (protected) and y (base) of a space, stacked as columns over everything that writes into it,

    ||M x - y||^2 = <M, M G> - 2 <M, C> + tr B        G = x x^T    C = y x^T    B = y y^T

so a few numbers per head stand for millions of weights. Groups that act within frequency pairs need only the pairs'
products, read as complex numbers; groups that scale coordinates, only the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmergeable.architecture import Leg, Space, SymmetryMap
from unmergeable.architecture.symmetry import Variance
from unmergeable.gauge.act import leg_view
from unmergeable.gauge.elements import split_pairs
from unmergeable.sums import PIECE

CHUNK_ELEMENTS = 1 << 22
"""Numbers multiplied at a time as matrices, besides the tensors themselves; element by element :data:`PIECE`."""


@dataclass(frozen=True)
class LegPair:
    """One leg of a space on a protected tensor and on the base's: views [outer, blocks, *spectators, size, inner]."""

    variance: Variance
    protected: Tensor
    base: Tensor

    def parts(self, elements: int) -> Iterator[LegPair]:
        """Views of some of the vectors at a time, of about so many elements."""
        outer, *_, inner = self.protected.shape
        axis = 0 if outer > inner else self.protected.dim() - 1
        length = self.protected.shape[axis]
        step = max(1, elements * length // max(1, self.protected.numel()))
        for start in range(0, length, step):
            sides = (side.narrow(axis, start, min(step, length - start)) for side in (self.protected, self.base))
            yield LegPair(self.variance, *sides)

    def chunks(self, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Both as float64 [outer, blocks, spectators, size, inner], about so many elements at a time."""
        _, blocks, *_, size, _ = self.protected.shape
        for part in self.parts(elements):
            sides = (part.protected, part.base)
            x, y = (side.reshape(side.shape[0], blocks, -1, size, side.shape[-1]).double() for side in sides)
            yield x, y

    def pieces(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Both as :meth:`chunks` gives them, about :data:`PIECE` numbers that lie together in memory, after their
        blocks and their coordinates."""
        outer, blocks, *_, size, inner = self.protected.shape
        every = slice(None)
        if outer > inner:
            yield from ((every, every, x, y) for x, y in self.chunks(PIECE))
            return
        by_block = blocks > size
        length = blocks if by_block else size
        step = max(1, PIECE * length // max(1, self.protected.numel()))
        for start in range(0, length, step):
            some = slice(start, start + step)
            sides = (side[:, some] if by_block else side[..., some, :] for side in (self.protected, self.base))
            part = LegPair(self.variance, *sides)
            for x, y in part.chunks(max(1, part.protected.numel())):
                yield (some, every, x, y) if by_block else (every, some, x, y)


def legs_by_space(symmetry: SymmetryMap) -> dict[str, list[tuple[str, Leg]]]:
    """For each space, its legs with the tensors they are on."""
    by_space: dict[str, list[tuple[str, Leg]]] = {name: [] for name in symmetry.spaces}
    for tensor, legs in symmetry.legs.items():
        for leg in legs:
            by_space[leg.space].append((tensor, leg))
    return by_space


def leg_pairs(
    space: Space,
    legs: Iterable[tuple[str, Leg]],
    protected: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    gain_offset: Mapping[str, float],
) -> list[LegPair]:
    """The legs of ``space`` on tensors of both checkpoints, as the network sees them (``offset + w``)."""
    pairs = []
    for name, leg in legs:
        sides = [tensors[name] for tensors in (protected, base)]
        if name in gain_offset:
            sides = [side + gain_offset[name] for side in sides]
        pairs.append(LegPair(leg.variance, *(leg_view(side, leg, space) for side in sides)))
    return pairs


@dataclass(frozen=True)
class Moments:
    """G, C and B of the module docstring, float64: [blocks, size, size], or their diagonals [blocks, size]."""

    protected: Tensor
    cross: Tensor
    base: Tensor


@dataclass(frozen=True)
class PairMoments:
    """Frequency pairs as complex coordinates: sum |x|^2 (float64) and sum y conj(x) (complex128), [blocks, pairs]."""

    protected: Tensor
    cross: Tensor


def dense_moments(space: Space, legs: Sequence[LegPair], variance: Variance) -> Moments:
    """All second moments over the legs of one variance (zero where there is none)."""
    protected, cross, base = torch.zeros(3, space.blocks, space.size, space.size, dtype=torch.float64)
    for x, y in _chunks(legs, variance, CHUNK_ELEMENTS):
        x_columns, y_columns = _columns(x), _columns(y)
        protected += x_columns @ x_columns.mT
        cross += y_columns @ x_columns.mT
        base += y_columns @ y_columns.mT
    return Moments(protected, cross, base)


def block_products(space: Space, legs: Sequence[LegPair], variance: Variance) -> Tensor:
    """``y x^T`` between every block of the base and every protected one: float64 [blocks, size, blocks, size]."""
    width = space.blocks * space.size
    products = torch.zeros(width, width, dtype=torch.float64)
    for x, y in _chunks(legs, variance, CHUNK_ELEMENTS):
        products += _columns(y).reshape(width, -1) @ _columns(x).reshape(width, -1).T
    return products.view(space.blocks, space.size, space.blocks, space.size)


def diagonal_moments(space: Space, legs: Sequence[LegPair], variance: Variance) -> Moments:
    """The diagonals of :func:`dense_moments`, without computing the rest."""
    protected, cross, base = torch.zeros(3, space.blocks, space.size, dtype=torch.float64)
    for leg in legs:
        if leg.variance == variance:
            for blocks, places, x, y in leg.pieces():
                protected[blocks, places] += x.square().sum((0, 2, 4))
                cross[blocks, places] += (y * x).sum((0, 2, 4))
                base[blocks, places] += y.square().sum((0, 2, 4))
    return Moments(protected, cross, base)


def pair_moments(space: Space, legs: Sequence[LegPair], variance: Variance) -> PairMoments:
    """Moments of the frequency pairs over the legs of one variance."""
    protected = torch.zeros(space.blocks, space.size // 2, dtype=torch.float64)
    cross = torch.zeros(space.blocks, space.size // 2, dtype=torch.complex128)
    for x, y in _chunks(legs, variance, PIECE):
        protected += sum(member.square().sum((0, 2, 4)) for member in _pair(space, x))
        cross += pair_products(space, x, y).sum(1)
    return PairMoments(protected, cross)


def pair_products(space: Space, x: Tensor, y: Tensor) -> Tensor:
    """``y conj(x)`` per block, spectator and frequency pair: complex128 [blocks, spectators, pairs]."""
    (x_real, x_imaginary), (y_real, y_imaginary) = _pair(space, x), _pair(space, y)
    real = (y_real * x_real + y_imaginary * x_imaginary).sum((0, 4))
    imaginary = (y_imaginary * x_real - y_real * x_imaginary).sum((0, 4))
    return torch.complex(real, imaginary)


def _pair(space: Space, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    assert space.group.pairing is not None
    return split_pairs(coordinates, space.group.pairing)


def _columns(coordinates: Tensor) -> Tensor:
    """[blocks, size, everything else]."""
    _, blocks, _, size, _ = coordinates.shape
    return coordinates.permute(1, 3, 0, 2, 4).reshape(blocks, size, -1)


def _chunks(legs: Sequence[LegPair], variance: Variance, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    for leg in legs:
        if leg.variance == variance:
            yield from leg.chunks(elements)
