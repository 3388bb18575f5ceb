"""``slerp``: spherical interpolation of two models, tensor by tensor (Shoemake 1985; popular through mergekit).

With omega the angle between the two tensors as vectors, and t from 0 (the first model) to 1 (the second):

    theta = sin((1 - t) omega) / sin(omega) * theta_1 + sin(t omega) / sin(omega) * theta_2

Where |cos(omega)| > ``linear_above`` the two are interpolated linearly, as in mergekit: the sines lose their
precision. The weights are not normalised; only the angle is that of the directions. mergekit's ``base_model`` is the
first model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import acos, sin, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies, fill_coefficients
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, weighted_sum, widened_blocks
from unmergeable.merges.engine import in_memory
from unmergeable.registry import Requirements

_SMALLEST_NORM = 1e-8
"""Below it a tensor counts as zero, and has no direction."""


@dataclass(frozen=True)
class Slerp(Merge):
    """``t`` is the way from the first expert to the second. Coefficients a and b mean t = b / (a + b)."""

    name: ClassVar[str] = "slerp"
    most_experts: ClassVar[int | None] = 2
    varies: ClassVar[Varies] = {"t": "tensor"}

    t: float = 0.5
    linear_above: float = 0.9995

    def requirements(self) -> Requirements:
        return Requirements()

    def validate(self) -> None:
        if not 0 <= self.t <= 1:
            raise UsageError(f"t={self.t}: must lie in [0, 1], from the first expert to the second.")
        if not 0 <= self.linear_above <= 1:
            raise UsageError(f"linear_above={self.linear_above}: must lie in [0, 1]; it is compared with a cosine.")

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """``(1 - t, t)``. Raises UsageError for one coefficient of two, negative ones, or a sum of 0."""
        return resolve_two(self.name, coefficients, self.t)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        t = terms.of_tensor("t", terms.coefficients[1])
        weights = slerp_weights(t, cosine(operands, scratch), linear_above=self.linear_above)
        return merge_blocks(name, operands, partial(_merge_block, weights=weights), scratch)


slerp = in_memory(Slerp)


def resolve_two(name: str, coefficients: Sequence[float | None], t: float) -> tuple[float, float]:
    """``(1 - t, t)``, from two coefficients where they are given.

    Raises:
        UsageError: one coefficient of two, negative ones, or a sum of 0.
    """
    if all(coefficient is None for coefficient in coefficients):
        return (1 - t, t)
    if any(coefficient is None for coefficient in coefficients):
        raise UsageError(f"{name}: give both experts a coefficient, or neither (and set t).")
    first, second = fill_coefficients(coefficients, default=0.0)
    if min(first, second) < 0 or first + second == 0:
        raise UsageError(f"{name}: coefficients {(first, second)} must not be negative, nor both 0.")
    return (first / (first + second), second / (first + second))


def cosine(operands: Sequence[Operand], scratch: Scratch) -> float:
    """Between the two tensors as vectors; 0 where one of them is zero."""
    first = second = product = 0.0
    for (one, other), (squares,) in widened_blocks(operands, scratch, spare=1):
        # torch sums in a cascade, as exactly as the products are; a dot product in float32 loses two digits more.
        first += float(torch.mul(one, one, out=squares).sum())
        second += float(torch.mul(other, other, out=squares).sum())
        product += float(one.mul_(other).sum())
    norms = [sqrt(square) if sqrt(square) > _SMALLEST_NORM else 1.0 for square in (first, second)]
    return max(-1.0, min(1.0, product / (norms[0] * norms[1])))


def slerp_weights(t: float, cosine: float, *, linear_above: float) -> tuple[float, float]:
    """The factors of the two tensors."""
    if abs(cosine) > linear_above:
        return 1 - t, t
    omega = acos(cosine)
    return sin((1 - t) * omega) / sin(omega), sin(t * omega) / sin(omega)


def _merge_block(blocks: list[Tensor], spare: list[Tensor], *, weights: Sequence[float]) -> Tensor:
    return weighted_sum(blocks, weights)
