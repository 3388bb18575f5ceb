"""Hidden states of two networks brought into one basis: the similarity transformation nearest by least squares.

    min over s, orthogonal Q, offset t of  sum over rows |s (x - mean x) Q + t - y|^2

Q = U V^T of the singular values x^T y = U S V^T, s = tr S / |x|^2, t = mean y, with x and y less their means
(Schoenemann and Carroll 1970). The stream of a network may lie in any rotated basis and be scaled, and the network is
the same; what is left after the fit is a difference in what the two compute. A transformation with more freedom would
take such differences with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Similarity:
    """x -> scale (x - center) rotation + offset.

    Attributes:
        rotation: orthogonal, [width, width].
        scale: one factor for all coordinates.
        center, offset: means of both sides, [width].
        spread: mean squared distance of the rows of the other side from their mean.
        explained: share of ``spread`` that the transformed rows account for, from 0 to 1.
    """

    rotation: Tensor
    scale: float
    center: Tensor
    offset: Tensor
    spread: float
    explained: float

    def distance(self, rows: Tensor, others: Tensor) -> Tensor:
        """Mean squared distance after the transformation, in units of ``spread``: both [rows, width], to a scalar."""
        moved = self.scale * (rows - self.center.to(rows)) @ self.rotation.to(rows) + self.offset.to(rows)
        return (moved - others).square().sum(dim=-1).mean() / self.spread


class PairedMoments:
    """Sums over paired rows, in float64: all that a similarity is fitted from."""

    def __init__(self, width: int, device: torch.device) -> None:
        zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((width, width), width, width)]
        self._cross, self._first, self._second = zeros
        self._energies = (0.0, 0.0)
        self.rows = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Rows of both sides, [rows, width]."""
        x, y = first.double(), second.double()
        self._cross += x.T @ y
        self._first += x.sum(dim=0)
        self._second += y.sum(dim=0)
        self._energies = (self._energies[0] + float(x.square().sum()), self._energies[1] + float(y.square().sum()))
        self.rows += len(x)

    def fit(self) -> Similarity | None:
        """The transformation of the first side; None where one side never changes."""
        center, offset = self._first / self.rows, self._second / self.rows
        energy, other = (
            total - self.rows * float(mean.square().sum())
            for total, mean in zip(self._energies, (center, offset), strict=True)
        )
        if not (energy > 0 and other > 0):
            return None
        left, values, right = torch.linalg.svd(self._cross - self.rows * torch.outer(center, offset))
        trace = float(values.sum())
        return Similarity(
            rotation=left @ right,
            scale=trace / energy,
            center=center,
            offset=offset,
            spread=other / self.rows,
            explained=trace**2 / (energy * other),
        )
