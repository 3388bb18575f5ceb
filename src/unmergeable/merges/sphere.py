"""What merges on a sphere share: they see the models through their inner products alone.

Every point such a merge visits, on the unit sphere around an origin, is a linear combination of the models. So one pass
over a tensor gathers the inner products of all pairs, the search runs on a handful of numbers in float64, and a second
pass adds the models up with the weights that were found. Nothing is held as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, weighted_sum, widened_blocks
from unmergeable.registry import Requirements

Origin = Literal["zero", "base"]
"""Where the sphere has its centre: models are points as they are ("zero"), or task vectors ("base")."""

Weights = npt.NDArray[np.float64]
"""One for each model; as a point, the sum of the models times these."""


def requirements_of(origin: Origin) -> Requirements:
    """The base, where it is the centre."""
    return Requirements(needs=("base",)) if origin == "base" else Requirements()


def inner_products(operands: Sequence[Operand], origin: Origin, scratch: Scratch) -> Weights:
    """Of all pairs of models, as seen from the origin: float64, [models, models].

    Args:
        operands: the models; before them the base, where it is the origin.
        origin: the centre.
        scratch: buffers.
    """
    skipped = 1 if origin == "base" else 0
    count = len(operands) - skipped
    products = np.zeros((count, count))
    for blocks, (product,) in widened_blocks(operands, scratch, spare=1):
        models = blocks[skipped:]
        if skipped:
            for model in models:
                model.sub_(blocks[0])
        for row, one in enumerate(models):
            for column, other in enumerate(models[: row + 1]):
                # torch sums in a cascade, as exactly as the products are; a dot product in float32 loses two digits.
                products[row, column] += float(torch.mul(one, other, out=product).sum())
    return products + np.tril(products, -1).T


def length_of(point: Weights, products: Weights) -> float:
    """The norm of a point, from the inner products of the models; what rounding made negative counts as 0."""
    return float(np.sqrt(max(0.0, float(point @ products @ point))))


def combination(
    name: str, operands: Sequence[Operand], origin: Origin, weights: Sequence[float], scratch: Scratch
) -> Tensor:
    """The origin plus the sum of the models times their weights.

    Raises:
        BadInput: the merge is not finite.
    """
    if origin == "zero":
        return merge_blocks(name, operands, partial(_add, weights=weights), scratch)
    return merge_blocks(name, operands, partial(_add_to_base, weights=weights), scratch)


def _add(blocks: list[Tensor], spare: list[Tensor], *, weights: Sequence[float]) -> Tensor:
    return weighted_sum(blocks, weights)


def _add_to_base(blocks: list[Tensor], spare: list[Tensor], *, weights: Sequence[float]) -> Tensor:
    base, *experts = blocks
    for expert in experts:
        expert.sub_(base)
    return base.add_(weighted_sum(experts, weights))
