"""``adamerging``: task vectors, scaled so that the merge is sure of its answers (AdaMerging, arXiv 2310.02575).

    theta^l = theta_0^l + sum_i lambda_i^l tau_i^l

The coefficients start at ``start`` and follow the gradient of the entropy of the merge's predictions on unlabelled
inputs of every task, each with its own head, by Adam. ``granularity=layer`` learns one for every tensor l and expert i,
which is what the authors' code calls a layer; ``task`` one for every expert. As there, they are kept in [0, 1].

``task_vectors=ties`` is AdaMerging++: the tau_i are first trimmed to ``density``, and what has the sign that lost the
election of ``ties`` is set to 0. They are then summed, not averaged.

The merge of one tensor is all there is here; its coefficients are learnt with a live network. Without data they stay at
``start``: task arithmetic, or TIES with sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges import task_arithmetic
from unmergeable.merges.base import (
    Inputs,
    TensorMerge,
    TermsOf,
    fill_coefficients,
    require_choice,
    require_density,
    require_finite,
)
from unmergeable.merges.blocks import Operand, Scratch, compute_dtype, merge_blocks, weighted_sum
from unmergeable.merges.fisher import require_examples
from unmergeable.merges.magnitudes import largest_below
from unmergeable.merges.ties import global_thresholds

Granularity = Literal["layer", "task"]
TaskVectors = Literal["plain", "ties"]


@dataclass(frozen=True)
class AdaMerging:
    """Defaults are the authors'.

    ``heads`` are beginnings of tensor names, separated by blanks: the heads of the tasks, which differ from expert to
    expert and are not merged. The base's stay in the merge. ``examples`` is the most that are read of each data set,
    ``batch_size`` how many of each task one step sees.
    """

    name: ClassVar[str] = "adamerging"
    needs_base: ClassVar[bool] = True
    fewest_experts: ClassVar[int] = 1
    most_experts: ClassVar[int | None] = None
    varies: ClassVar[Mapping[str, Literal["expert", "tensor"]]] = {}

    granularity: Granularity = "layer"
    task_vectors: TaskVectors = "plain"
    density: float = 0.2
    start: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16
    heads: str = ""
    examples: int = 1000
    seed: int = 0

    def validate(self) -> None:
        require_choice("granularity", self.granularity, get_args(Granularity))
        require_choice("task_vectors", self.task_vectors, get_args(TaskVectors))
        require_density(self.density)
        require_finite("start", self.start)
        require_examples(self.examples)
        if not 0 < self.learning_rate < torch.inf:
            raise UsageError(f"learning_rate={self.learning_rate}: must be positive.")
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(f"steps={self.steps}, batch_size={self.batch_size}: at least one of each is needed.")

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        return fill_coefficients(coefficients, default=self.start)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        if self.task_vectors == "plain":
            return partial(_merge_plain, terms=terms)
        experts = len(inputs.operands(inputs.names[0])) - 1
        thresholds = global_thresholds(inputs, (self.density,) * experts)

        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            coefficients = terms(name).coefficients
            return merge_tensor(name, operands, scratch, coefficients=coefficients, thresholds=thresholds)

        return merge


def merge_tensor(
    name: str,
    operands: Sequence[Operand],
    scratch: Scratch,
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[float],
) -> Tensor:
    """``base + sum_i coefficients[i] * tau_i`` with the tau_i trimmed below ``thresholds`` and of the elected sign."""
    kernel = partial(_merge_block, coefficients=coefficients, thresholds=thresholds)
    return merge_blocks(name, operands, kernel, scratch, spare=1)


def keep_elected(task_vectors: Sequence[Tensor], elected: Tensor, thresholds: Sequence[float]) -> None:
    """Trim task vectors in place below their thresholds, then zero what has not the sign of their sum.

    ``elected`` is a buffer of the same size.
    """
    for task_vector, threshold in zip(task_vectors, thresholds, strict=True):
        cut = largest_below(threshold, compute_dtype(task_vector.dtype))  # hardshrink keeps what is strictly larger
        if cut is not None:
            torch.hardshrink(task_vector, cut, out=task_vector)
    elected.copy_(task_vectors[0])
    for task_vector in task_vectors[1:]:
        elected.add_(task_vector)
    elected.sign_()
    for task_vector in task_vectors:
        # Times the sign, what agrees is positive; times the sign again, it is itself.
        task_vector.mul_(elected).relu_().mul_(elected)


def _merge_plain(name: str, operands: Sequence[Operand], scratch: Scratch, *, terms: TermsOf) -> Tensor:
    return task_arithmetic.merge_tensor(name, operands, scratch, coefficients=terms(name).coefficients)


def _merge_block(
    blocks: list[Tensor], spare: list[Tensor], *, coefficients: Sequence[float], thresholds: Sequence[float]
) -> Tensor:
    base, *experts = blocks
    task_vectors = [expert.sub_(base) for expert in experts]
    keep_elected(task_vectors, spare[0], thresholds)
    return base.add_(weighted_sum(task_vectors, coefficients))
