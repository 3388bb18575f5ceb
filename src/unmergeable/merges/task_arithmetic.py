"""``task_arithmetic``: the base plus scaled task vectors (arXiv 2212.04089).

    theta = theta_0 + sum_i lambda_i (theta_i - theta_0)

Negative coefficients take a task away. The default 0.3 is the one that MergeLock and MergeGuard report.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.merges.base import Merge, Terms, fill_coefficients, require_finite
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, weighted_sum
from unmergeable.merges.engine import in_memory


@dataclass(frozen=True)
class TaskArithmetic(Merge):
    """``scaling_coefficient`` is the lambda of every expert that comes without its own."""

    name: ClassVar[str] = "task_arithmetic"
    fewest_experts: ClassVar[int] = 1

    scaling_coefficient: float = 0.3

    def validate(self) -> None:
        require_finite("scaling_coefficient", self.scaling_coefficient)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        return fill_coefficients(coefficients, default=self.scaling_coefficient)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        return merge_tensor(name, operands, scratch, coefficients=terms.coefficients)


task_arithmetic = in_memory(TaskArithmetic)


def merge_tensor(name: str, operands: Sequence[Operand], scratch: Scratch, *, coefficients: Sequence[float]) -> Tensor:
    """``base + sum_i coefficients[i] * (experts[i] - base)``, in the compute dtype and rounded once."""
    return merge_blocks(name, operands, partial(_merge_block, coefficients=coefficients), scratch)


def _merge_block(blocks: list[Tensor], spare: list[Tensor], *, coefficients: Sequence[float]) -> Tensor:
    # The task vectors are summed before the base joins them: their differences are nearly exact in float32 and
    # their sum is small, so that only the last addition rounds at the size of the weights.
    base, *experts = blocks
    task_vectors = [expert.sub_(base) for expert in experts]
    return base.add_(weighted_sum(task_vectors, coefficients))
