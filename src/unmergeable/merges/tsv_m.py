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

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.merges.engine import in_memory
from unmergeable.merges.spectral import SpectralMerge


@dataclass(frozen=True)
class TsvM(SpectralMerge):
    """``scaling_coefficient`` is the factor of the merged task vector."""

    name: ClassVar[str] = "tsv_m"

    def merge_matrices(self, task_matrices: list[Tensor]) -> Tensor:
        left, values, right = _directions(task_matrices)
        return (left * torch.cat(values)) @ right.T


tsv_m = in_memory(TsvM)


def merged_parts(task_matrices: list[Tensor]) -> list[Tensor]:
    """What each expert adds to the merged task matrix: multiplied by coefficients, the parts of those multiplied."""
    left, values, right = _directions(task_matrices)
    counts = [len(value) for value in values]
    sides = zip(left.split(counts, dim=1), values, right.split(counts, dim=1), strict=True)
    return [(own * value) @ other.T for own, value, other in sides]


def _directions(task_matrices: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Left and right directions of all experts side by side, made orthogonal, and each expert's singular values."""
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
    left, right = (orthonormalised(torch.cat(sides, dim=1)) for sides in (lefts, rights))
    return left, values, right


def orthonormalised(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (the polar factor)."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest
