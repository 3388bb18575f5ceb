"""What merges by singular values share: matrices are merged as wholes, everything else is averaged."""

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
        require_finite("scaling_coefficient", self.scaling_coefficient)

    @abstractmethod
    def merge_matrices(self, task_matrices: list[Tensor]) -> Tensor:
        """The merged task matrix of (rows, columns) from those of the experts, which it may overwrite."""

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        factor = terms.of_tensor("scaling_coefficient", self.scaling_coefficient)
        whole = partial(self._merge_tensors, coefficients=terms.coefficients, factor=factor)
        return merge_whole(name, operands, whole, scratch)

    def _merge_tensors(self, tensors: list[Tensor], *, coefficients: Sequence[float], factor: float) -> Tensor:
        base, *experts = tensors
        task_vectors = [expert.sub_(base).mul_(c) for expert, c in zip(experts, coefficients, strict=True)]
        if is_matrix(base):
            return base.add_(self.merge_matrices(task_vectors), alpha=factor)
        return base.add_(summed(task_vectors), alpha=factor / len(task_vectors))


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is merged by singular values; all others are averaged."""
    return tensor.dim() == 2 and tensor.numel() > 0


def summed(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, left to right, in the memory of the first one."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total
