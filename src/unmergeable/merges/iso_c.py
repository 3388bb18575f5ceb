"""``iso_c``: task arithmetic with a flat spectrum (isotropic merging in the common subspace, arXiv 2502.04959).

A sum of task matrices is dominated by a few directions that the tasks share. For a weight matrix with task matrices
Delta_i = c_i (theta_i - theta_0), all singular values of the sum are replaced by their mean:

    U S V^T = sum_i Delta_i
    theta   = theta_0 + scaling_coefficient * mean(S) U V^T

Tensors that are not matrices are averaged, theta_0 + scaling_coefficient * mean_i Delta_i. The authors choose the
scaling on validation data (1.5 suits eight vision tasks); without data it is 1. mergekit has no such method. Needs
whole matrices in memory, and their singular value decompositions take time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.merges.engine import merge_state_dicts
from unmergeable.merges.spectral import SpectralMerge, summed
from unmergeable.network.disk_weights import Weights


@dataclass(frozen=True)
class IsoC(SpectralMerge):
    """``scaling_coefficient`` is the factor of the merged task vector."""

    name: ClassVar[str] = "iso_c"

    def merge_matrices(self, task_matrices: list[Tensor]) -> Tensor:
        return flattened(summed(task_matrices))


def iso_c(
    base: Weights,
    experts: Sequence[Weights],
    *,
    coefficients: Sequence[float | None] | None = None,
    scaling_coefficient: float = 1.0,
) -> dict[str, Tensor]:
    """Add the task matrices with their spectrum made flat (isotropic merging, arXiv 2502.04959), in memory.

    Settings are those of :class:`IsoC`; the rest is as for :func:`~unmergeable.merges.merge_state_dicts`.
    """
    method = IsoC(scaling_coefficient)
    return merge_state_dicts(base, experts, method=method, coefficients=coefficients)


def flattened(task_matrix: Tensor) -> Tensor:
    """The matrix with every singular value replaced by their mean."""
    left, values, right = torch.linalg.svd(task_matrix, full_matrices=False)
    flat: Tensor = (left @ right).mul_(values.mean())
    return flat
