"""``wudi``: the task vector that disturbs each expert's inputs least (WUDI-Merging, arXiv 2503.08099).

A linear layer that is trained moves along its inputs, so the rows of a task matrix span about what the layer is given
in that task. With tau_i = c_i (theta_i - theta_0), inputs along the last axis, the merged task matrix tau is to do to
those rows what tau_i does:

    loss(tau) = sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2
    theta     = theta_0 + scaling_coefficient * tau

From tau = sum_i tau_i, Adam takes ``steps`` steps of ``learning_rate``, as the authors do; their scaling is 1. The loss
is quadratic: with G_i = tau_i^T tau_i / |tau_i|^2 its gradient is 2 (tau sum_i G_i - sum_i tau_i G_i). That is what is
computed here, one product of matrices a step for any number of experts; the authors differentiate the loss. Nothing is
drawn.

The minimum, (sum_i tau_i G_i) (sum_i G_i)^+, is not taken instead. It is what ``regmean`` would give with G_i for its
inputs, but sum_i G_i is nearly singular: experts that disagree are then told apart by what is noise in all of them,
with weights that are many times theirs. The authors stop long before: ``steps * learning_rate`` is about how far a
weight gets.

A coefficient multiplies what an expert aims at and leaves its part in the loss alone; one of 0 leaves the expert out.
Tensors that are no matrices, and embeddings, which have no inputs, are averaged: theta_0 + scaling_coefficient *
mean_i tau_i. ``inputs_along=rows`` is for files that have the inputs along the first axis (GPT-2). mergekit has no such
method. Needs whole matrices in memory, and ``steps`` products of them take time: at [4096, 4096] 41 teraflops.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.checkpoint.spare import is_input_embedding
from unmergeable.errors import UsageError
from unmergeable.merges.engine import in_memory
from unmergeable.merges.spectral import SpectralMerge, summed

InputsAlong = Literal["columns", "rows"]

_OTHER_EMBEDDINGS = re.compile(
    r"(.*[._])?(wpe|\w*position\w*|pos_embed\w*|token_type\w*|relative_attention_bias)(\.weight)?"
)


@dataclass(frozen=True)
class Wudi(SpectralMerge):
    """``scaling_coefficient`` is the factor of the merged task vector."""

    name: ClassVar[str] = "wudi"

    learning_rate: float = 1e-5
    steps: int = 300
    inputs_along: InputsAlong = "columns"

    def validate(self) -> None:
        super().validate()
        if not 0 < self.learning_rate < torch.inf:
            raise UsageError(f"learning_rate={self.learning_rate}: must be positive.")
        if self.steps < 1:
            raise UsageError(f"steps={self.steps}: at least one is needed.")

    def is_whole(self, name: str) -> bool:
        return not (is_input_embedding(name) or _OTHER_EMBEDDINGS.fullmatch(name))

    def merge_matrices(self, task_matrices: list[Tensor]) -> Tensor:
        if self.inputs_along == "rows":
            return self._descended([matrix.T.contiguous() for matrix in task_matrices]).T
        return self._descended(task_matrices)

    def _descended(self, task_matrices: list[Tensor]) -> Tensor:
        total, aims = normal_equations(task_matrices)
        merged = summed(task_matrices)
        optimizer = torch.optim.Adam([merged], lr=self.learning_rate)
        for _ in range(self.steps):
            merged.grad = torch.addmm(aims, merged, total, beta=-2, alpha=2)
            optimizer.step()
        return merged


wudi = in_memory(Wudi)


def normal_equations(task_matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``sum_i G_i`` of [columns, columns] and ``sum_i tau_i G_i`` of [rows, columns].

    The loss is least where ``tau`` times the first is the second. A task matrix of zeros has no part in either.
    """
    columns = task_matrices[0].shape[1]
    total, aims = task_matrices[0].new_zeros(columns, columns), torch.zeros_like(task_matrices[0])
    for task_matrix in task_matrices:
        norm = float(task_matrix.double().norm())
        if norm > 0:
            direction = task_matrix / norm
            gram = direction.T @ direction
            total.add_(gram)
            aims.addmm_(task_matrix, gram)
    return total, aims
