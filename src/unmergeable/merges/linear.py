"""``linear``: the weighted average of the experts (model soups, arXiv 2203.05482).

    theta = sum_i c_i theta_i / sum_i c_i

The base takes no part, as in mergekit: to average it in, name it as an expert too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, fill_coefficients
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, weighted_sum
from unmergeable.merges.engine import in_memory
from unmergeable.registry import Requirements


@dataclass(frozen=True)
class Linear(Merge):
    """Weight averaging. ``normalize=False`` leaves the weights as given, whatever they add up to."""

    name: ClassVar[str] = "linear"
    fewest_experts: ClassVar[int] = 1

    normalize: bool = True

    def requirements(self) -> Requirements:
        return Requirements()

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """The weights, 1 by default. Raises UsageError unless their sum is one to divide by."""
        weights = fill_coefficients(coefficients, default=1.0)
        if self.normalize and sum(weights) <= 0:
            raise UsageError(
                f"linear: the coefficients add up to {sum(weights):g}; an average needs a positive sum "
                "(or normalize=false)."
            )
        return weights

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        weights = terms.coefficients
        return merge_tensor(name, operands, scratch, weights=weights, divisor=sum(weights) if self.normalize else 1.0)


linear = in_memory(Linear)


def merge_tensor(
    name: str, operands: Sequence[Operand], scratch: Scratch, *, weights: Sequence[float], divisor: float
) -> Tensor:
    """``sum_i weights[i] * operands[i] / divisor`` in the compute dtype, rounded once."""
    return merge_blocks(name, operands, partial(_merge_block, weights=weights, divisor=divisor), scratch)


def _merge_block(experts: list[Tensor], spare: list[Tensor], *, weights: Sequence[float], divisor: float) -> Tensor:
    # Dividing last keeps the average of equal tensors equal to them; weights like 1/3 would not.
    return weighted_sum(experts, weights).div_(divisor)
