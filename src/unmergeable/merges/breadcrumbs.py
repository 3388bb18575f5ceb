"""``breadcrumbs``: drop the smallest and the very largest weights of the task vectors, add (arXiv 2312.06795).

In every tensor, with the magnitudes of tau_i = theta_i - theta_0 ranked, the largest ``gamma`` of them (outliers) are
dropped and the largest ``density`` of the rest kept:

    m_i[p] = 1 where |tau_i[p]| is among ranks gamma n + 1 to (gamma + density) n, else 0
    theta  = theta_0 + sum_i lambda_i m_i (theta_i - theta_0)

The defaults are where the authors' own search starts: keep 0.15, drop the top 0.006, lambda 0.2. They rank within
each row of a matrix (``trim="row"``); their paper says per layer, which is the default here (``trim="tensor"``).

Of equal magnitudes at a threshold all are kept. mergekit keeps an exact number of them, and an unstable sort chooses
which; its density defaults to 1 and its gamma to 0.01. Its weights are the lambda_i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies, fill_coefficients, require_density, require_finite
from unmergeable.merges.blocks import (
    Operand,
    Scratch,
    accumulation_dtype,
    merge_blocks,
    row_length,
    weighted_sum,
    whole_rows,
)
from unmergeable.merges.engine import in_memory
from unmergeable.merges.magnitudes import largest_below, tensor_magnitudes

Trim = Literal["tensor", "row"]

Band = tuple[int, int]
"""First and last rank kept, counted from 1 = largest; empty where the last comes before the first."""

Cut = tuple[float | None, float | None]
"""Magnitudes up to the first, and those above the second, are dropped; None where nothing is, for either."""


@dataclass(frozen=True)
class Breadcrumbs(Merge):
    """``density`` is the fraction kept, ``gamma`` the fraction of outliers; ``scaling_coefficient`` the lambda."""

    name: ClassVar[str] = "breadcrumbs"
    fewest_experts: ClassVar[int] = 1
    varies: ClassVar[Varies] = {"density": "expert", "gamma": "expert"}

    density: float = 0.15
    gamma: float = 0.006
    scaling_coefficient: float = 0.2
    trim: Trim = "tensor"

    def validate(self) -> None:
        require_band(self.density, self.gamma)
        require_finite("scaling_coefficient", self.scaling_coefficient)
        super().validate()

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        return fill_coefficients(coefficients, default=self.scaling_coefficient)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        shape = operands[0].shape
        length = row_length(shape) if self.trim == "row" else operands[0].numel
        densities = terms.per_expert("density", self.density)
        gammas = terms.per_expert("gamma", self.gamma)
        bands = [kept_band(*fractions, length) for fractions in zip(densities, gammas, strict=True)]
        if self.trim == "row":
            return merge_rows(name, operands, scratch, coefficients=terms.coefficients, bands=bands)
        return merge_tensor(name, operands, scratch, coefficients=terms.coefficients, bands=bands)


breadcrumbs = in_memory(Breadcrumbs)


def require_band(density: float, gamma: float) -> None:
    """Raise UsageError unless both are fractions."""
    require_density(density)
    if not 0 <= gamma < 1:
        raise UsageError(f"gamma={gamma}: must lie in [0, 1), the fraction of outliers dropped.")


def kept_band(density: float, gamma: float, size: int) -> Band:
    """The ranks kept of ``size``. Where both fractions do not fit, fewer outliers are dropped.

    A density of 1 drops nothing. Both counts are rounded down, as mergekit does.
    """
    kept = int(density * size)
    outliers = min(int(gamma * size), size - kept)
    return outliers + 1, outliers + kept


def merge_tensor(
    name: str, operands: Sequence[Operand], scratch: Scratch, *, coefficients: Sequence[float], bands: Sequence[Band]
) -> Tensor:
    """``base + sum_i coefficients[i] * task_vector_i``, of each only the magnitudes of the ranks in its band."""
    cuts = tensor_cuts(operands, bands, scratch)
    kernel = partial(_merge_block, coefficients=coefficients, cuts=cuts)
    return merge_blocks(name, operands, kernel, scratch, spare=1)


def tensor_cuts(operands: Sequence[Operand], bands: Sequence[Band], scratch: Scratch) -> list[Cut | None]:
    """Which magnitudes each expert keeps in one tensor; the base comes first among the operands."""
    size = operands[0].numel
    dtype = accumulation_dtype(operands[0].dtype)
    if size == 0 or all(band == (1, size) for band in bands):
        return [(None, None)] * len(bands)
    # An empty band has no ranks to look up.
    ranks = [band if band[0] <= band[1] else (1, 1) for band in bands]
    return [
        (largest_below(smallest, dtype), largest) if first <= last else None
        for (first, last), (largest, smallest) in zip(bands, tensor_magnitudes(operands, ranks, scratch), strict=True)
    ]


def merge_rows(
    name: str, operands: Sequence[Operand], scratch: Scratch, *, coefficients: Sequence[float], bands: Sequence[Band]
) -> Tensor:
    """The same with the magnitudes ranked within each row."""
    length = row_length(operands[0].shape)

    def kernel(blocks: list[Tensor], spare: list[Tensor]) -> Tensor:
        base, *experts = blocks
        for expert, (first, last) in zip(experts, bands, strict=True):
            rows = expert.sub_(base).reshape(-1, length)
            if first > last:
                rows.zero_()
                continue
            magnitudes = rows.abs()
            ordered = magnitudes.sort(dim=-1, descending=True).values
            kept = (magnitudes <= ordered[:, first - 1 : first]) & (magnitudes >= ordered[:, last - 1 : last])
            rows.mul_(kept)
        return base.add_(weighted_sum(experts, coefficients))

    return merge_blocks(name, operands, kernel, scratch, size=whole_rows(length))


def _merge_block(
    blocks: list[Tensor], spare: list[Tensor], *, coefficients: Sequence[float], cuts: Sequence[Cut | None]
) -> Tensor:
    base, *experts = blocks
    crumbs(base, experts, cuts, spare[0])
    return base.add_(weighted_sum(experts, coefficients))


def crumbs(base: Tensor, experts: Sequence[Tensor], cuts: Sequence[Cut | None], outliers: Tensor) -> None:
    """Turn one block of the experts into their task vectors, without what is cut. ``outliers`` is a buffer."""
    for expert, cut in zip(experts, cuts, strict=True):
        expert.sub_(base)
        if cut is None:
            expert.zero_()
            continue
        below, above = cut
        # hardshrink keeps what is strictly larger than its argument, bit by bit: the difference of two is exact.
        if below is not None:
            torch.hardshrink(expert, below, out=expert)
        if above is not None:
            expert.sub_(torch.hardshrink(expert, above, out=outliers))
