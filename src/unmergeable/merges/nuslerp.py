"""``nuslerp``: spherical interpolation of two models or two task vectors, as wholes or row by row (mergekit).

With x_1 and x_2 the tensors, or their differences to the base where ``origin`` is the base, omega the angle between
them, and t from 0 (the first model) to 1:

    x = (sin((1 - t) omega) x_1 + sin(t omega) x_2) / sin(omega)

``along`` says what has an angle: the "tensor", each "row" (the last axis), or each "column" (the first axis; so does
mergekit with ``nuslerp_row_wise``). Where sin(omega) < 1e-8 the two are interpolated linearly. Coefficients a and b
mean t = b / (a + b).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, merge_whole, whole_rows
from unmergeable.merges.engine import in_memory
from unmergeable.merges.slerp import resolve_two, slerp_weights
from unmergeable.merges.sphere import Origin, combination, inner_products, requirements_of
from unmergeable.registry import Requirements

Along = Literal["tensor", "row", "column"]

_SMALLEST_SINE = 1e-8
_SMALLEST_NORM = 1e-7
"""As in mergekit: a shorter vector has no direction."""


@dataclass(frozen=True)
class NuSlerp(Merge):
    """``t`` is the way from the first expert to the second."""

    name: ClassVar[str] = "nuslerp"
    most_experts: ClassVar[int | None] = 2
    varies: ClassVar[Varies] = {"t": "tensor"}

    t: float = 0.5
    origin: Origin = "base"
    along: Along = "tensor"

    def requirements(self) -> Requirements:
        return requirements_of(self.origin)

    def validate(self) -> None:
        if not 0 <= self.t <= 1:
            raise UsageError(f"t={self.t}: must lie in [0, 1], from the first expert to the second.")
        super().validate()

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """``(1 - t, t)``. Raises UsageError for one coefficient of two, negative ones, or a sum of 0."""
        return resolve_two(self.name, coefficients, self.t)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        t = terms.of_tensor("t", terms.coefficients[1])
        shape = operands[0].shape
        if self.along == "tensor" or not shape:
            products = inner_products(operands, self.origin, scratch)
            norms = np.sqrt(np.diag(products)).clip(_SMALLEST_NORM)
            cosine = float(np.clip(products[0, 1] / (norms[0] * norms[1]), -1, 1))
            weights = slerp_weights(t, cosine, linear_above=_LINEAR_ABOVE)
            return combination(name, operands, self.origin, weights, scratch)
        if self.along == "row":
            rows = partial(_merge_rows, t=t, length=max(1, shape[-1]))
            return merge_blocks(name, operands, rows, scratch, size=whole_rows(max(1, shape[-1])))
        return merge_whole(name, operands, partial(_merge_columns, t=t), scratch)


nuslerp = in_memory(NuSlerp)

_LINEAR_ABOVE = float(np.sqrt(1 - _SMALLEST_SINE**2))


def _merge_rows(blocks: list[Tensor], spare: list[Tensor], *, t: float, length: int) -> Tensor:
    return _interpolated([block.view(-1, length) for block in blocks], t).view(-1)


def _merge_columns(tensors: list[Tensor], *, t: float) -> Tensor:
    moved = [tensor.transpose(0, -1) for tensor in tensors]
    return _interpolated(moved, t).transpose(0, -1)


def _interpolated(models: list[Tensor], t: float) -> Tensor:
    """Along the last axis, for two models and perhaps a base before them."""
    *base, first, second = models
    for model in (first, second) if base else ():
        model.sub_(base[0])
    norms = [model.double().norm(dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM) for model in (first, second)]
    cosine = (first.double() * second).sum(dim=-1, keepdim=True).div(norms[0] * norms[1]).clamp(-1, 1)
    is_straight = 1 - cosine.square() <= _SMALLEST_SINE**2
    angle = torch.acos(torch.where(is_straight, 0.0, cosine))
    weights = [
        torch.where(is_straight, share, torch.sin(share * angle) / torch.sin(angle)).to(first.dtype)
        for share in (1 - t, t)
    ]
    merged = first.mul_(weights[0]).add_(second.mul_(weights[1]))
    return base[0].add_(merged) if base else merged
