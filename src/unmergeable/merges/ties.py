"""``ties``: trim, elect sign, disjoint merge (TIES-Merging, arXiv 2306.01708).

With tau_i = theta_i - theta_0, and per weight p:

    trim      keep tau_i[p] where |tau_i[p]| is in the largest ``density`` of tau_i, else 0
    elect     s[p] = sign(sum_i c_i tau_i[p])
    merge     tau[p] = mean of c_i tau_i[p] over the kept experts whose sign is s[p]
    theta     = theta_0 + scaling_coefficient * tau

The defaults (density 0.2 over the whole task vector, c_i = 1, scaling 1) are the paper's "k = 20, lambda = 1".
Where implementations differ, both exist:

=============  ==========================================================  =======================================
setting        paper                                                       mergekit
=============  ==========================================================  =======================================
``trim``       ``global``: one threshold per task vector                   ``tensor``: one per tensor
``average``    ``count``: divide by the number of experts that agree       ``weight``: by the sum of their c_i
                                                                           (``sum`` for normalize: false)
``undecided``  ``drop``: a mass of exactly 0 elects nobody                 ``positive``: it elects +
=============  ==========================================================  =======================================

Of equal magnitudes at the threshold all are kept, as in the authors' code. mergekit keeps an exact number of them,
and an unstable sort chooses which; its density defaults to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.blocks import Operand, Scratch, compute_dtype, merge_blocks, widened_blocks
from unmergeable.merges.method import Inputs, TensorMerge, fill_coefficients
from unmergeable.merges.quantile import DIGITS, KthLargest

Trim = Literal["global", "tensor"]
Average = Literal["count", "weight", "sum"]
Undecided = Literal["drop", "positive"]


@dataclass(frozen=True)
class Ties:
    """``density`` is the fraction of each task vector that is kept; the module's table has the other settings."""

    name: ClassVar[str] = "ties"
    needs_base: ClassVar[bool] = True
    fewest_experts: ClassVar[int] = 2

    density: float = 0.2
    scaling_coefficient: float = 1.0
    trim: Trim = "global"
    average: Average = "count"
    undecided: Undecided = "drop"

    def validate(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(f"density={self.density}: must lie in (0, 1], the fraction of weights kept.")
        if not isfinite(self.scaling_coefficient):
            raise UsageError(f"scaling_coefficient={self.scaling_coefficient}: must be a finite number.")
        for setting, value, choices in (
            ("trim", self.trim, get_args(Trim)),
            ("average", self.average, get_args(Average)),
            ("undecided", self.undecided, get_args(Undecided)),
        ):
            if value not in choices:
                raise UsageError(f"{setting}={value}: must be one of {', '.join(choices)}.")

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """The c_i, 1 by default. Raises UsageError for a negative one: it would vote against its own expert."""
        filled = fill_coefficients(coefficients, default=1.0)
        if min(filled) < 0 or max(filled) == 0:
            raise UsageError(f"ties: coefficients {filled} must be positive (0 leaves an expert out, but not all).")
        return filled

    def prepare(self, inputs: Inputs, coefficients: tuple[float, ...]) -> TensorMerge:
        merge = partial(
            merge_tensor,
            coefficients=coefficients,
            scaling_coefficient=self.scaling_coefficient,
            average=self.average,
            undecided=self.undecided,
        )
        if self.trim == "global":
            return partial(merge, thresholds=global_thresholds(inputs, self.density))

        def merge_trimmed_alone(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            return merge(name, operands, scratch, thresholds=tensor_thresholds(operands, self.density, scratch))

        return merge_trimmed_alone


def merge_tensor(
    name: str,
    operands: Sequence[Operand],
    scratch: Scratch,
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[float],
    scaling_coefficient: float = 1.0,
    average: Average = "count",
    undecided: Undecided = "drop",
) -> Tensor:
    """The TIES merge of a base and its experts, whose task vectors are trimmed below ``thresholds``."""
    kernel = partial(
        _merge_block,
        coefficients=coefficients,
        # hardshrink keeps what is strictly larger than its argument.
        cuts=[largest_below(threshold, compute_dtype(operands[0].dtype)) for threshold in thresholds],
        scaling_coefficient=scaling_coefficient,
        average=average,
        undecided=undecided,
    )
    return merge_blocks(name, operands, kernel, scratch, spare=3)


def global_thresholds(inputs: Inputs, density: float) -> tuple[float, ...]:
    """Per expert, the magnitude that ``density`` of the weights of its task vector reach: exact, streamed."""
    bases = [inputs.operands(name)[0] for name in inputs.names]
    # The widest compute dtype of the model: every magnitude in it is exact.
    dtype = max((compute_dtype(base.dtype) for base in bases), key=lambda dtype: dtype.itemsize)

    def total(searches: Sequence[KthLargest]) -> Tensor:
        return inputs.total(partial(_count_digits, searches), stage="ranking task vectors")

    experts = len(inputs.operands(inputs.names[0])) - 1
    return _thresholds(total, density, sum(base.numel for base in bases), dtype, experts)


def tensor_thresholds(operands: Sequence[Operand], density: float, scratch: Scratch) -> tuple[float, ...]:
    """The same among the weights of one tensor."""
    base, *experts = operands

    def total(searches: Sequence[KthLargest]) -> Tensor:
        return _count_digits(searches, operands, scratch)

    return _thresholds(total, density, base.numel, compute_dtype(base.dtype), len(experts))


def _thresholds(
    total: Callable[[Sequence[KthLargest]], Tensor], density: float, size: int, dtype: torch.dtype, experts: int
) -> tuple[float, ...]:
    """Run one search per expert, all in the same passes; ``total`` makes a pass and counts digits for each."""
    if density == 1 or size == 0:
        return (0.0,) * experts  # trims nothing
    searches = [KthLargest(rank_kept(density, size), dtype)] * experts
    while not searches[0].is_settled:
        searches = [search.narrow(counts) for search, counts in zip(searches, total(searches), strict=True)]
    return tuple(search.value for search in searches)


def rank_kept(density: float, size: int) -> int:
    """How many of ``size`` weights are kept: ``density`` of them rounded down, at least one."""
    return max(1, int(density * size))


def largest_below(threshold: float, dtype: torch.dtype) -> float | None:
    """The largest number of ``dtype`` below ``threshold``; None where nothing lies below a magnitude of 0."""
    if threshold == 0:
        return None
    rounded = torch.tensor(threshold, dtype=dtype)
    if float(rounded) >= threshold:
        rounded = rounded.nextafter(torch.zeros_like(rounded))
    return float(rounded)


def _count_digits(searches: Sequence[KthLargest], operands: Sequence[Operand], scratch: Scratch) -> Tensor:
    """The digit counts of every search over its expert's task vector: int64 of shape (experts, 2^16)."""
    counts = torch.zeros(len(searches), DIGITS, dtype=torch.int64, device=operands[0].device)
    for (base, *experts), _ in widened_blocks(operands, scratch):
        for count, search, expert in zip(counts, searches, experts, strict=True):
            count.add_(search.count(expert.sub_(base)))
    return counts


def _merge_block(
    blocks: list[Tensor],
    spare: list[Tensor],
    *,
    coefficients: Sequence[float],
    cuts: Sequence[float | None],
    scaling_coefficient: float,
    average: Average,
    undecided: Undecided,
) -> Tensor:
    base, *experts = blocks
    elected, total, agreeing = (buffer.zero_() for buffer in spare)
    for expert, coefficient, cut in zip(experts, coefficients, cuts, strict=True):
        expert.sub_(base)
        if cut is not None:
            torch.hardshrink(expert, cut, out=expert)
        elected.add_(expert.mul_(coefficient))
    if undecided == "positive":
        torch.copysign(torch.ones_like(elected), elected, out=elected)
    else:
        elected.sign_()

    # Comparisons and masks are slow on the CPU. Multiplied by the elected sign, those that agree are positive.
    for expert, coefficient in zip(experts, coefficients, strict=True):
        magnitude = expert.mul_(elected).relu_()
        total.add_(magnitude)
        agreeing.add_(magnitude.sign_(), alpha=1.0 if average == "count" else coefficient)
    if average != "sum":
        # Where nobody agrees the total is 0 too, and 0 / tiny = 0.
        total.div_(agreeing.clamp_min_(torch.finfo(agreeing.dtype).tiny))
    return base.addcmul_(total, elected, value=scaling_coefficient)
