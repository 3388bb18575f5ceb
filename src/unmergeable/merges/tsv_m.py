"""``tsv_m``: merge the main singular directions of the task matrices, made orthogonal (TSV-Merge, arXiv 2412.00081).

For a weight matrix with task matrices Delta_i = c_i (theta_i - theta_0) = U_i S_i V_i^T and N experts, the first
k = rank // N singular directions of each are put side by side, U = [U_1 ... U_N] and V likewise. They interfere as far
as they are not orthogonal, so U and V are replaced by the nearest matrices with orthonormal columns:

    theta = theta_0 + scaling_coefficient * polar(U) diag(S_1 ... S_N) polar(V)^T,    polar(X) = P Q^T of X = P D Q^T

Tensors that are not matrices are averaged, theta_0 + scaling_coefficient * mean_i Delta_i. Directions without a
singular value (below rounding; a LoRA expert has few) are arbitrary and are left out, which changes nothing else.

The default scaling of 1 is the authors'. They choose k from all min(rows, columns) directions, as here. mergekit has
no such method. Needs whole matrices in memory, and their singular value decompositions take time.
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
class TsvM:
    """``scaling_coefficient`` is the factor of the merged task vector."""

    name: ClassVar[str] = "tsv_m"
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


def merge_matrices(task_matrices: Sequence[Tensor]) -> Tensor:
    """The merged task matrix of (rows, columns) from those of the experts."""
    rows, columns = task_matrices[0].shape
    per_expert = min(rows, columns) // len(task_matrices)
    lefts, values, rights = [], [], []
    for task_matrix in task_matrices:
        left, value, right = torch.linalg.svd(task_matrix, full_matrices=False)
        rounding = torch.finfo(value.dtype).eps * max(rows, columns)
        count = min(per_expert, int((value > rounding * value.max()).sum()) if value.numel() else 0)
        lefts.append(left[:, :count])
        values.append(value[:count])
        rights.append(right[:count].T)
    return (orthonormalised(torch.cat(lefts, dim=1)) * torch.cat(values)) @ orthonormalised(torch.cat(rights, dim=1)).T


def orthonormalised(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (the polar factor)."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _merge_tensors(tensors: list[Tensor], *, coefficients: Sequence[float], scaling_coefficient: float) -> Tensor:
    base, *experts = tensors
    task_vectors = [expert.sub_(base).mul_(c) for expert, c in zip(experts, coefficients, strict=True)]
    if base.dim() == 2:
        return base.add_(merge_matrices(task_vectors), alpha=scaling_coefficient)
    return base.add_(sum(task_vectors[1:], task_vectors[0]), alpha=scaling_coefficient / len(task_vectors))
