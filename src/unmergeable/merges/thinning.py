"""Task vectors thinned by a mask, and what makes up for the weights dropped: shared by DARE and DELLA.

``rescale`` says how the survivors are scaled:

===========  ==================================================================  ==================================
value        factor                                                              whose
===========  ==================================================================  ==================================
``density``  1 / the probability with which a weight was kept                    the papers'
``norm``     sum |tau| / sum |mask tau| over the tensor: keeps the L1 norm       mergekit, ``rescale: true``
``none``     1                                                                   mergekit, ``rescale: false``
===========  ==================================================================  ==================================
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, weighted_sum
from unmergeable.merges.election import SPARE, Election
from unmergeable.merges.masks import bernoulli_mask, l1_ratios, mask_stream, remembered

Rescale = Literal["density", "norm", "none"]


def bernoulli_masks(
    name: str, operands: Sequence[Operand], densities: Sequence[float], seed: int, rescale: Rescale
) -> list[Operand]:
    """DARE's masks of tensor ``name``, one per expert."""
    _, *experts = operands
    masks = [
        bernoulli_mask(mask_stream(seed, number, name), density, expert)
        for number, (expert, density) in enumerate(zip(experts, densities, strict=True), start=1)
    ]
    # The norm takes a pass of its own, and a bit is read faster than drawn.
    return [remembered(mask) for mask in masks] if rescale == "norm" else masks


def compensated(
    coefficients: Sequence[float],
    operands: Sequence[Operand],
    masks: Sequence[Operand],
    densities: Sequence[float],
    rescale: Rescale,
    scratch: Scratch,
) -> tuple[float, ...]:
    """The factor of each expert's thinned task vector: its coefficient times what makes up for the drop."""
    if rescale == "density":
        return tuple(c / density for c, density in zip(coefficients, densities, strict=True))
    if rescale == "norm":
        ratios = l1_ratios(operands, masks, scratch)
        return tuple(
            coefficient if density == 1 else coefficient * ratio
            for coefficient, density, ratio in zip(coefficients, densities, ratios, strict=True)
        )
    return tuple(coefficients)


def merge_thinned(
    name: str, operands: Sequence[Operand], masks: Sequence[Operand], scratch: Scratch, *, factors: Sequence[float]
) -> Tensor:
    """``base + sum_i factors[i] * masks[i] * (experts[i] - base)``."""
    return merge_blocks(name, (*operands, *masks), partial(_add_block, factors=factors), scratch)


def merge_elected(
    name: str,
    operands: Sequence[Operand],
    masks: Sequence[Operand],
    scratch: Scratch,
    *,
    factors: Sequence[float],
    election: Election,
) -> Tensor:
    """The same with signs elected."""
    kernel = partial(_elect_block, factors=factors, election=election)
    return merge_blocks(name, (*operands, *masks), kernel, scratch, spare=SPARE)


def _thinned(blocks: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    count = (len(blocks) - 1) // 2
    base, experts, masks = blocks[0], blocks[1 : 1 + count], blocks[1 + count :]
    return base, [expert.sub_(base).mul_(mask) for expert, mask in zip(experts, masks, strict=True)]


def _add_block(blocks: list[Tensor], spare: list[Tensor], *, factors: Sequence[float]) -> Tensor:
    base, task_vectors = _thinned(blocks)
    return base.add_(weighted_sum(task_vectors, factors))


def _elect_block(blocks: list[Tensor], spare: list[Tensor], *, factors: Sequence[float], election: Election) -> Tensor:
    base, task_vectors = _thinned(blocks)
    weighted = [task_vector.mul_(factor) for task_vector, factor in zip(task_vectors, factors, strict=True)]
    return election.add(base, weighted, spare)
