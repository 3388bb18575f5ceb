"""``model_stock``: the average of the experts, drawn back to the base as far as they disagree (arXiv 2403.19522).

Fine-tunes lie on a thin shell around a centre that few of them approximate. With N experts whose task vectors
include the angle alpha, in every tensor:

    t     = N cos(alpha) / (1 + (N - 1) cos(alpha))
    theta = t * mean_i theta_i + (1 - t) * theta_0

For N > 2 the mean of the cosines over all pairs is taken. Orthogonal task vectors give the base; t is not clamped, so
that opposed ones extrapolate, and where the denominator vanishes (less than 1e-6) the base stays.

mergekit's variants: ``filter_wise`` has an angle for each row (the last axis) instead of each tensor, and
``smallest_norms=1e-6`` is a floor under the product of two norms, which turns small task vectors into orthogonal ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms
from unmergeable.merges.blocks import (
    BLOCK_ELEMENTS,
    Operand,
    Scratch,
    merge_blocks,
    weighted_sum,
    whole_rows,
    widened_blocks,
)
from unmergeable.merges.engine import in_memory

_SINGULAR = 1e-6
"""A denominator closer to 0 than this has no finite interpolation to offer."""


@dataclass(frozen=True)
class ModelStock(Merge):
    """Chooses its own interpolation: it takes no coefficients."""

    name: ClassVar[str] = "model_stock"

    filter_wise: bool = False
    smallest_norms: float = 0.0

    def validate(self) -> None:
        if not self.smallest_norms >= 0:
            raise UsageError(f"smallest_norms={self.smallest_norms}: must not be negative.")

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """1/N each. Raises UsageError when one is given."""
        if any(coefficient is not None for coefficient in coefficients):
            raise UsageError("model_stock weighs the experts by their angles; give them without coefficients.")
        return (1 / len(coefficients),) * len(coefficients)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        return merge_tensor(name, operands, scratch, filter_wise=self.filter_wise, smallest_norms=self.smallest_norms)


model_stock = in_memory(ModelStock)


def merge_tensor(
    name: str, operands: Sequence[Operand], scratch: Scratch, *, filter_wise: bool = False, smallest_norms: float = 0.0
) -> Tensor:
    """The Model Stock merge of a base and its experts."""
    if filter_wise:
        length = operands[0].shape[-1] if operands[0].shape else 1
        kernel = partial(_merge_rows, length=length, smallest_norms=smallest_norms)
        return merge_blocks(name, operands, kernel, scratch, size=whole_rows(max(1, length)))
    products = torch.zeros(len(operands) - 1, len(operands) - 1, 1, dtype=torch.float64)
    for (base, *experts), _ in widened_blocks(operands, scratch, size=BLOCK_ELEMENTS):
        products += inner_products([expert.sub_(base).reshape(1, -1) for expert in experts]).cpu()
    ratio = float(interpolation(products, smallest_norms))
    return merge_blocks(name, operands, partial(_merge_block, ratio=ratio), scratch)


def inner_products(task_vectors: Sequence[Tensor]) -> Tensor:
    """Of task vectors given as rows, per row: float64 of shape (experts, experts, rows)."""
    count, rows = len(task_vectors), task_vectors[0].shape[0]
    products = torch.zeros(count, count, rows, dtype=torch.float64, device=task_vectors[0].device)
    for one in range(count):
        for other in range(one, count):
            product = (task_vectors[one] * task_vectors[other]).sum(dim=-1, dtype=torch.float64)
            products[one, other] = products[other, one] = product
    return products


def interpolation(products: Tensor, smallest_norms: float) -> Tensor:
    """t from the inner products of the task vectors, per row: (experts, experts, rows) -> (rows,)."""
    count = products.shape[0]
    norms = products.diagonal(dim1=0, dim2=1).T.sqrt()
    cosines = []
    for one, other in combinations(range(count), 2):
        # Of two vectors of which one is 0 the product is 0 as well: 0 / tiny = 0.
        scale = (norms[one] * norms[other]).clamp_min(max(smallest_norms, torch.finfo(torch.float64).tiny))
        cosines.append((products[one, other] / scale).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(dim=0)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < _SINGULAR
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, denominator))


def _merge_block(blocks: list[Tensor], spare: list[Tensor], *, ratio: float) -> Tensor:
    # t (mean - base) + base: the task vectors are small, and only the last sum rounds at the size of the weights.
    base, *experts = blocks
    task_vectors = [expert.sub_(base) for expert in experts]
    return base.add_(weighted_sum(task_vectors, [ratio / len(experts)] * len(experts)))


def _merge_rows(blocks: list[Tensor], spare: list[Tensor], *, length: int, smallest_norms: float) -> Tensor:
    base, *experts = (block.reshape(-1, length) for block in blocks)
    task_vectors = [expert.sub_(base) for expert in experts]
    ratios = interpolation(inner_products(task_vectors), smallest_norms).to(base.dtype)
    mean = weighted_sum(task_vectors, [1 / len(experts)] * len(experts))
    return base.add_(mean.mul_(ratios[:, None])).reshape(-1)
