"""``sce``: select what varies most, weight experts by their energy, erase the minority (FuseChat, arXiv 2408.07990).

With tau_i = theta_i - theta_0, tensor by tensor:

    select      keep the weights whose variance over the experts is in the largest ``density`` of the non-zero ones
    calculate   w_i = mean tau_i^2 / sum_j mean tau_j^2
    erase       s = sign(sum_i tau_i), + where that is 0; drop tau_i where its sign is not s
    theta       = theta_0 + sum_i w_i tau_i / sum_i w_i, over the tau_i that are left, weight by weight

The published default selects a tenth (``density`` = 0.1); mergekit's ``select_topk`` is 1, which keeps all. Of equal
variances at the threshold all are kept; mergekit keeps an exact number. Coefficients are factors of the task vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.merges.base import Merge, Terms, Varies, require_density
from unmergeable.merges.blocks import Operand, Scratch, accumulation_dtype, merge_blocks, widened_blocks
from unmergeable.merges.engine import in_memory
from unmergeable.quantile import KthLargest

_SMALLEST = 1e-6
"""As in mergekit: a smaller sum of weights is not divided by, and a smaller sum of energies weighs all alike."""


@dataclass(frozen=True)
class Sce(Merge):
    """``density`` is the fraction of the weights that is selected."""

    name: ClassVar[str] = "sce"
    varies: ClassVar[Varies] = {"density": "tensor"}

    density: float = 0.1

    def validate(self) -> None:
        require_density(self.density)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        density = terms.of_tensor("density", self.density)
        smallest = None if density == 1 else _smallest_selected(operands, density, terms.coefficients, scratch)
        shares = _shares(operands, smallest, terms.coefficients, scratch)
        kernel = partial(_merge_block, coefficients=terms.coefficients, smallest=smallest, shares=shares)
        return merge_blocks(name, operands, kernel, scratch, spare=3)


sce = in_memory(Sce)


def _task_vectors(blocks: list[Tensor], coefficients: Sequence[float]) -> list[Tensor]:
    base, *experts = blocks
    return [expert.sub_(base).mul_(c) for expert, c in zip(experts, coefficients, strict=True)]


def variance(task_vectors: Sequence[Tensor]) -> Tensor:
    """Of every weight over the experts: the numbers of ``torch.var``, which takes fourteen times as long over few."""
    wide = [task_vector.double() for task_vector in task_vectors]  # in which torch.var sums float32, too
    mean = wide[0].clone()
    for task_vector in wide[1:]:
        mean.add_(task_vector)
    mean.div_(len(wide))
    total = torch.sub(wide[0], mean).square_()
    away = torch.empty_like(total)
    for task_vector in wide[1:]:
        total.add_(torch.sub(task_vector, mean, out=away).square_())
    return total.div_(len(wide)).to(task_vectors[0].dtype)


def _smallest_selected(
    operands: Sequence[Operand], density: float, coefficients: Sequence[float], scratch: Scratch
) -> float:
    """The smallest variance that is selected; infinity where none is."""
    dtype = accumulation_dtype(operands[0].dtype)
    search = KthLargest(1, dtype)  # of which rank is known only after the first pass, and does not matter in it
    changed, counts = 0, torch.zeros_like(search.count(torch.empty(0, dtype=dtype)))
    for blocks, _ in widened_blocks(operands, scratch):
        variances = variance(_task_vectors(blocks, coefficients))
        changed += int(torch.count_nonzero(variances))
        counts += search.count(variances)
    rank = int(changed * density)
    if rank == 0:
        return float("inf")
    search = KthLargest(rank, dtype).narrow(counts)
    while not search.is_settled:
        counts.zero_()
        for blocks, _ in widened_blocks(operands, scratch):
            counts += search.count(variance(_task_vectors(blocks, coefficients)))
        search = search.narrow(counts)
    return search.value


def _selected(task_vectors: list[Tensor], smallest: float | None) -> list[Tensor]:
    if smallest is not None:
        is_selected = variance(task_vectors) >= smallest
        for task_vector in task_vectors:
            task_vector.mul_(is_selected)
    return task_vectors


def _shares(
    operands: Sequence[Operand], smallest: float | None, coefficients: Sequence[float], scratch: Scratch
) -> list[float]:
    energies = [0.0] * len(coefficients)
    for blocks, _ in widened_blocks(operands, scratch):
        for number, task_vector in enumerate(_selected(_task_vectors(blocks, coefficients), smallest)):
            energies[number] += float(task_vector.square_().sum())
    means = [energy / max(1, operands[0].numel) for energy in energies]
    total = sum(means)
    return [1 / len(means)] * len(means) if total < _SMALLEST else [mean / total for mean in means]


def _merge_block(
    blocks: list[Tensor],
    spare: list[Tensor],
    *,
    coefficients: Sequence[float],
    smallest: float | None,
    shares: Sequence[float],
) -> Tensor:
    sign, total, weight = spare
    task_vectors = _selected(_task_vectors(blocks, coefficients), smallest)
    sign.zero_()
    for task_vector in task_vectors:
        sign.add_(task_vector)
    sign.ge_(0).mul_(2).sub_(1)
    total.zero_()
    weight.zero_()
    for task_vector, share in zip(task_vectors, shares, strict=True):
        agrees = task_vector.mul(sign) > 0
        weight.add_(agrees, alpha=share)
        total.add_(task_vector.mul_(agrees), alpha=share)
    return blocks[0].add_(total.div_(weight.clamp_(min=_SMALLEST)))
