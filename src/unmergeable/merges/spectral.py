"""What merges by singular values, or Gram matrices, share: they take matrices as wholes and average everything else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.merges.base import Merge, Terms, Varies, require_finite
from unmergeable.merges.blocks import Operand, Scratch, merge_whole


@dataclass(frozen=True)
class SpectralMerge(Merge, ABC):
    """A merge that says what becomes of the task matrices; ``scaling_coefficient`` is the factor of the merged one."""

    varies: ClassVar[Varies] = {"scaling_coefficient": "tensor"}

    scaling_coefficient: float = 1.0

    def validate(self) -> None:
        super().validate()
        require_finite("scaling_coefficient", self.scaling_coefficient)

    def is_whole(self, name: str) -> bool:
        """Whether a matrix of this name is merged as one; all are, unless a method has a reason."""
        return True

    @abstractmethod
    def merge_matrices(self, task_matrices: list[Tensor]) -> Tensor:
        """The merged task matrix of (rows, columns) from those of the experts, which it may overwrite."""

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        factor = terms.of_tensor("scaling_coefficient", self.scaling_coefficient)
        merge = self._merged if self.is_whole(name) else _averaged
        return merge_whole(name, operands, partial(merge, coefficients=terms.coefficients, factor=factor), scratch)

    def _merged(self, tensors: list[Tensor], *, coefficients: Sequence[float], factor: float) -> Tensor:
        if not is_matrix(tensors[0]):
            return _averaged(tensors, coefficients=coefficients, factor=factor)
        base, *task_matrices = _multiplied(tensors, coefficients)
        return base.add_(self.merge_matrices(task_matrices), alpha=factor)


def _averaged(tensors: list[Tensor], *, coefficients: Sequence[float], factor: float) -> Tensor:
    base, *task_vectors = _multiplied(tensors, coefficients)
    return base.add_(summed(task_vectors), alpha=factor / len(task_vectors))


def _multiplied(tensors: list[Tensor], coefficients: Sequence[float]) -> list[Tensor]:
    """The base and the experts' task vectors, each times its coefficient, in their memory."""
    base, *experts = tensors
    return [base, *(expert.sub_(base).mul_(c) for expert, c in zip(experts, coefficients, strict=True))]


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is merged by singular values; all others are averaged."""
    return tensor.dim() == 2 and tensor.numel() > 0


def summed(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, left to right, in the memory of the first one."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total
