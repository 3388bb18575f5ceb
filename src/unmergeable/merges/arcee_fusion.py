"""``arcee_fusion``: the base, with the most important changes of one expert taken over (Arcee; mergekit).

With tau = theta_1 - theta_0, and p and q the softmax of a row (the last axis) of the expert and of the base, both plus
1e-8, the importance of a weight is

    I = |tau| sum_row p log(p / q)

and those with I >= median + ``width`` (third - first quartile), over the tensor, are taken over; width is 1.5.

Quartiles are exact, of all weights: the values at ranks floor(q (n - 1)) from the smallest. mergekit draws a million
weights, without a seed, where a tensor has more. The coefficient is a factor of tau.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from unmergeable.merges.base import Merge, Terms, Varies, require_finite
from unmergeable.merges.blocks import Operand, Scratch, merge_whole
from unmergeable.merges.engine import in_memory

_SMALLEST_SHARE = 1e-8


@dataclass(frozen=True)
class ArceeFusion(Merge):
    """``width``: how many distances between the quartiles above the median a change has to lie."""

    name: ClassVar[str] = "arcee_fusion"
    fewest_experts: ClassVar[int] = 1
    most_experts: ClassVar[int | None] = 1
    varies: ClassVar[Varies] = {"width": "tensor"}

    width: float = 1.5

    def validate(self) -> None:
        require_finite("width", self.width)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        width, (coefficient,) = terms.of_tensor("width", self.width), terms.coefficients
        return merge_whole(name, operands, partial(_merge, width=width, coefficient=coefficient), scratch)


arcee_fusion = in_memory(ArceeFusion)


def _merge(tensors: list[Tensor], *, width: float, coefficient: float) -> Tensor:
    base, expert = tensors
    if not base.numel():
        return base
    importance = importance_of(base, expert)
    first, median, third = quartiles(importance)
    is_taken = importance >= median + width * (third - first)
    return base.add_(expert.sub_(base).mul_(is_taken), alpha=coefficient)


def importance_of(base: Tensor, expert: Tensor) -> Tensor:
    """How important each change of a weight is; shaped as the tensors are."""
    if not base.dim():
        return torch.zeros_like(base)  # the softmax of one number is 1
    p, q = (tensor.softmax(dim=-1).add_(_SMALLEST_SHARE) for tensor in (expert, base))
    divergence = (p * (p / q).log_()).sum(dim=-1, keepdim=True)
    return expert.sub(base).abs_().mul_(divergence)


def quartiles(values: Tensor) -> tuple[float, float, float]:
    """The values at ranks floor(q (n - 1)), q = 1/4, 1/2, 3/4, from the smallest."""
    flat = values.detach().cpu().reshape(-1).numpy()
    first, median, third = (int(share * (len(flat) - 1)) for share in (0.25, 0.5, 0.75))
    ordered = np.partition(flat, median)  # one rank at a time: numpy takes six times as long for three
    if first < median:
        ordered[:median].partition(first)
    if third > median:
        ordered[median + 1 :].partition(third - median - 1)
    return float(ordered[first]), float(ordered[median]), float(ordered[third])
