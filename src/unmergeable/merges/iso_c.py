"""``iso_c``: task arithmetic with a flat spectrum (isotropic merging in the common subspace, arXiv 2502.04959).

A sum of task matrices is dominated by a few directions that the tasks share. For a weight matrix with task matrices
Delta_i = c_i (theta_i - theta_0), all singular values of the sum are replaced by their mean:

    U S V^T = sum_i Delta_i
    theta   = theta_0 + scaling_coefficient * mean(S) U V^T

Tensors that are not matrices are averaged, theta_0 + scaling_coefficient * mean_i Delta_i. The authors choose the
scaling on validation data (1.5 suits eight vision tasks); without data it is 1. mergekit has no such method. Needs
whole matrices in memory, and their singular value decompositions take time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.merges.blocks import Operand, Scratch, merge_whole
from unmergeable.merges.method import Inputs, TensorMerge, TermsOf, fill_coefficients, require_finite


@dataclass(frozen=True)
class IsoC:
    """``scaling_coefficient`` is the factor of the merged task vector."""

    name: ClassVar[str] = "iso_c"
    needs_base: ClassVar[bool] = True
    fewest_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = None
    varies: ClassVar[Mapping[str, Literal["expert", "tensor"]]] = {"scaling_coefficient": "tensor"}

    scaling_coefficient: float = 1.0

    def validate(self) -> None:
        require_finite("scaling_coefficient", self.scaling_coefficient)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        return fill_coefficients(coefficients, default=1.0)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            its = terms(name)
            whole = partial(
                _merge_tensors,
                coefficients=its.coefficients,
                scaling_coefficient=its.of_tensor("scaling_coefficient", self.scaling_coefficient),
            )
            return merge_whole(name, operands, whole, scratch)

        return merge


def flattened(task_matrix: Tensor) -> Tensor:
    """The matrix with every singular value replaced by their mean."""
    left, values, right = torch.linalg.svd(task_matrix, full_matrices=False)
    flat: Tensor = (left @ right).mul_(values.mean())
    return flat


def _merge_tensors(tensors: list[Tensor], *, coefficients: Sequence[float], scaling_coefficient: float) -> Tensor:
    base, *experts = tensors
    task_vectors = [expert.sub_(base).mul_(c) for expert, c in zip(experts, coefficients, strict=True)]
    total = task_vectors[0]
    for task_vector in task_vectors[1:]:
        total.add_(task_vector)
    if base.dim() == 2 and base.numel():
        return base.add_(flattened(total), alpha=scaling_coefficient)
    return base.add_(total, alpha=scaling_coefficient / len(task_vectors))
