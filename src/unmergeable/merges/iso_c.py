"""``iso_c``: task arithmetic with a flat spectrum (isotropic merging in the common subspace, arXiv 2502.04959).

A sum of task matrices is dominated by a few directions that the tasks share. For a weight matrix with task matrices
Delta_i = c_i (theta_i - theta_0), all singular values of the sum are replaced by their mean:

    U S V^T = sum_i Delta_i
    theta   = theta_0 + scaling_coefficient * mean(S) U V^T

Tensors that are not matrices are averaged, theta_0 + scaling_coefficient * mean_i Delta_i. The authors choose the
scaling on validation data (1.5 suits eight vision tasks); without data it is 1. mergekit has no such method. Needs
whole matrices in memory, and their singular value decompositions take time.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.merges.engine import in_memory
from unmergeable.merges.spectral import SpectralMerge, summed


@dataclass(frozen=True)
class IsoC(SpectralMerge):
    """``scaling_coefficient`` is the factor of the merged task vector."""

    name: ClassVar[str] = "iso_c"

    def merge_matrices(self, task_matrices: list[Tensor]) -> Tensor:
        return flattened(summed(task_matrices))


iso_c = in_memory(IsoC)


def flattened(task_matrix: Tensor) -> Tensor:
    """The matrix with every singular value replaced by their mean."""
    left, values, right = torch.linalg.svd(task_matrix, full_matrices=False)
    flat: Tensor = (left @ right).mul_(values.mean())
    return flat
