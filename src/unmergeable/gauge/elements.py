"""Elements of the gauge groups, and how one acts on coordinates.

Five representations cover every group of :mod:`unmergeable.architecture.symmetry`:

    Dense      M x                        general linear
    Orthogonal Q x                        a Dense whose inverse is its transpose
    Kronecker  (F_1 x ... x F_n) D P x    a rotation in small factors: O(d sum f) instead of O(d^2) per vector
    Monomial   x'_i = scale_i x_index_i   permutations, signs, scales, quarter turns
    Rotary     x'_p = z_p x_p             one complex number per frequency pair

Coordinates come as a view of shape [outer, blocks, *spectators, size, inner]; each element carries one
matrix per block, in float64, and acts on ``size`` in the dtype of the coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from unmergeable.architecture.symmetry import Pairing, Variance


class Element(Protocol):
    """One group element per block of a space."""

    def matrix(self) -> Tensor:
        """Dense form, float64 [blocks, size, size]."""
        ...

    def inverse(self) -> Element: ...

    def condition(self) -> float:
        """The largest spectral condition number over the blocks (1 for an isometry)."""
        ...

    def apply(self, coordinates: Tensor, variance: Variance) -> Tensor:
        """Transformed copy of a view [outer, blocks, *spectators, size, inner]."""
        ...


@dataclass(frozen=True)
class Dense:
    """``values`` float64 [blocks, size, size]."""

    values: Tensor

    def matrix(self) -> Tensor:
        return self.values

    def inverse(self) -> Dense:
        return Dense(torch.linalg.inv(self.values))

    @cached_property
    def _contragredient(self) -> Tensor:
        """M^-T, computed once however many pieces of a tensor it is applied to."""
        inverse: Tensor = torch.linalg.inv(self.values)
        return inverse.mT

    def condition(self) -> float:
        singular = torch.linalg.svdvals(self.values)
        return float((singular[..., 0] / singular[..., -1]).max())

    def apply(self, coordinates: Tensor, variance: Variance) -> Tensor:
        assert variance != "gain", "an elementwise gain has no image under a dense matrix"
        matrix = (self.values if variance == "vector" else self._contragredient).to(coordinates.dtype)
        outer, blocks, *_, size, inner = coordinates.shape
        flat = coordinates.reshape(outer, blocks, -1, size, inner)
        if inner == 1:
            # Columns of a reader: one [outer * spectators, size] x [size, size] product per block.
            rows = flat[..., 0].transpose(0, 1).reshape(blocks, -1, size)
            moved = torch.bmm(rows, matrix.mT).reshape(blocks, outer, -1, size).transpose(0, 1)
            return moved.reshape(coordinates.shape)
        return torch.matmul(matrix[None, :, None], flat).reshape(coordinates.shape)


@dataclass(frozen=True)
class Orthogonal(Dense):
    """``values`` float64 [blocks, size, size] with orthonormal rows."""

    def inverse(self) -> Orthogonal:
        return Orthogonal(self.values.mT)

    @property
    def _contragredient(self) -> Tensor:
        return self.values

    def condition(self) -> float:
        return 1.0

    def apply(self, coordinates: Tensor, variance: Variance) -> Tensor:
        return _folded_gain(coordinates) if variance == "gain" else super().apply(coordinates, variance)


@dataclass(frozen=True)
class Kronecker:
    """A rotation x' = (F_1 x ... x F_n) D P x, or its inverse: rotations of few coordinates, one after another.

    ``factors``: float64 [blocks, f_i, f_i] with orthonormal rows, whose sizes multiply to ``size``. ``monomial`` is
    D P, a signed permutation. Walsh-Hadamard matrices are the factors of a randomised Hadamard transform.
    """

    factors: tuple[Tensor, ...]
    monomial: Monomial
    is_inverse: bool = False

    def matrix(self) -> Tensor:
        blocks, size = self.monomial.index.shape
        columns = torch.eye(size, dtype=torch.float64).expand(1, blocks, size, size)
        return self.apply(columns, "vector")[0]

    def inverse(self) -> Kronecker:
        return Kronecker(self.factors, self.monomial, not self.is_inverse)

    def condition(self) -> float:
        return 1.0

    def apply(self, coordinates: Tensor, variance: Variance) -> Tensor:
        if variance == "gain":
            return _folded_gain(coordinates)
        if self.is_inverse:
            return self.monomial.inverse().apply(self._turned(coordinates, is_inverse=True), "vector")
        return self._turned(self.monomial.apply(coordinates, "vector"), is_inverse=False)

    def _turned(self, coordinates: Tensor, *, is_inverse: bool) -> Tensor:
        outer, blocks, *_, size, inner = coordinates.shape
        turned = coordinates
        before, behind = 1, size
        for factor in self.factors:
            own = factor.shape[-1]
            behind //= own
            matrix = (factor.mT if is_inverse else factor).to(coordinates.dtype)
            view = turned.reshape(outer, blocks, -1, own, behind * inner)
            if behind * inner == 1:
                rows = view[..., 0].transpose(0, 1).reshape(blocks, -1, own)
                turned = torch.bmm(rows, matrix.mT).reshape(blocks, outer, -1, own).transpose(0, 1)
            else:
                turned = torch.matmul(matrix[None, :, None], view) if blocks > 1 else torch.matmul(matrix[0], view)
            before *= own
        assert before == size, "the factors' sizes multiply to the size of the space"
        return turned.reshape(coordinates.shape)


@dataclass(frozen=True)
class Monomial:
    """``index`` int64 [blocks, size] and ``scale`` float64 [blocks, size]: x'_i = scale_i * x_index_i."""

    index: Tensor
    scale: Tensor

    def matrix(self) -> Tensor:
        blocks, size = self.index.shape
        matrix = torch.zeros(blocks, size, size, dtype=torch.float64)
        return matrix.scatter_(2, self.index[..., None], self.scale[..., None])

    def inverse(self) -> Monomial:
        back = torch.argsort(self.index, dim=1)
        return Monomial(back, 1.0 / torch.gather(self.scale, 1, back))

    def condition(self) -> float:
        magnitude = self.scale.abs()
        return float((magnitude.amax(1) / magnitude.amin(1)).max())

    @cached_property
    def _is_diagonal(self) -> bool:
        return bool((self.index == torch.arange(self.index.shape[1])).all())

    @cached_property
    def is_unscaled(self) -> bool:
        return bool((self.scale == 1).all())

    def apply(self, coordinates: Tensor, variance: Variance) -> Tensor:
        blocks, size = self.index.shape
        trailing = coordinates.dim() - 4  # spectators between blocks and size
        shape = (1, blocks, *([1] * trailing), size, 1)
        if self._is_diagonal:
            moved = coordinates
        elif blocks == 1:
            moved = coordinates.index_select(-2, self.index[0])
        else:
            moved = torch.gather(coordinates, -2, self.index.view(shape).expand(coordinates.shape))
        if variance == "gain":
            assert bool((self.scale.abs() == 1).all()), "a gain only follows signed permutations"
        elif not self.is_unscaled:
            scale = self.scale if variance == "vector" else 1.0 / self.scale
            return moved * scale.to(coordinates.dtype).view(shape)
        return moved.clone() if moved is coordinates else moved


@dataclass(frozen=True)
class Rotary:
    """``values`` complex128 [blocks, size // 2], one per frequency pair laid out as ``pairing``."""

    values: Tensor
    pairing: Pairing

    def matrix(self) -> Tensor:
        blocks, pairs = self.values.shape
        first, second = pair_indices(2 * pairs, self.pairing)
        matrix = torch.zeros(blocks, 2 * pairs, 2 * pairs, dtype=torch.float64)
        matrix[:, first, first] = matrix[:, second, second] = self.values.real
        matrix[:, first, second] = -self.values.imag
        matrix[:, second, first] = self.values.imag
        return matrix

    def inverse(self) -> Rotary:
        return Rotary(1.0 / self.values, self.pairing)

    def condition(self) -> float:
        # A block is a direct sum of scaled rotations: its singular values are the moduli.
        magnitude = self.values.abs()
        return float((magnitude.amax(1) / magnitude.amin(1)).max())

    def apply(self, coordinates: Tensor, variance: Variance) -> Tensor:
        assert variance != "gain", "a free phase does not commute with an elementwise gain"
        values = self.values if variance == "vector" else 1.0 / self.values.conj()
        trailing = coordinates.dim() - 4
        shape = (1, values.shape[0], *([1] * trailing), values.shape[1], 1)
        real, imaginary = (part.to(coordinates.dtype).reshape(shape) for part in (values.real, values.imag))
        first, second = split_pairs(coordinates, self.pairing)
        moved = torch.empty_like(coordinates, memory_format=torch.contiguous_format)
        out_first, out_second = split_pairs(moved, self.pairing)
        torch.sub(first * real, second * imaginary, out=out_first)
        torch.add(first * imaginary, second * real, out=out_second)
        return moved


def _folded_gain(coordinates: Tensor) -> Tensor:
    """diag(g) commutes with a rotation where g is one number: after the gain was folded into its readers."""
    first = coordinates.narrow(-2, 0, 1)
    spread = (coordinates - first).abs().max()
    assert bool(spread <= 16 * torch.finfo(coordinates.dtype).eps * first.abs().max()), "gain is not folded"
    return coordinates.clone()


def pair_indices(size: int, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Coordinates of the first and of the second member of each frequency pair."""
    if pairing == "half":
        return torch.arange(size // 2), torch.arange(size // 2, size)
    return torch.arange(0, size, 2), torch.arange(1, size, 2)


def split_pairs(coordinates: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Views of the first and second members along axis -2."""
    size = coordinates.shape[-2]
    if pairing == "half":
        return coordinates[..., : size // 2, :], coordinates[..., size // 2 :, :]
    return coordinates[..., 0::2, :], coordinates[..., 1::2, :]


def compose(second: Element, first: Element) -> Element:
    """The element that acts like ``first`` and then ``second``."""
    if isinstance(first, Monomial) and isinstance(second, Monomial):
        index = torch.gather(first.index, 1, second.index)
        return Monomial(index, second.scale * torch.gather(first.scale, 1, second.index))
    if isinstance(first, Rotary) and isinstance(second, Rotary) and first.pairing == second.pairing:
        return Rotary(second.values * first.values, first.pairing)
    return Dense(second.matrix() @ first.matrix())
