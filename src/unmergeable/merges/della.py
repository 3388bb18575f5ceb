"""``della``: drop weights at random, the smaller the likelier, then merge as TIES does (DELLA, arXiv 2406.11617).

MagPrune ranks the weights of a row (all that feed one output) by magnitude. With n in a row, the weight of rank r
(0 is the smallest) is kept with probability

    q = density - epsilon + 2 epsilon r / (n - 1)

and the survivors are divided by q, which keeps the expectation. With t_i the thinned task vectors:

    s     = sign(sum_i c_i t_i)
    tau   = mean of c_i t_i over the experts whose sign is s
    theta = theta_0 + scaling_coefficient * tau

The defaults are the authors' example: drop rate 0.3 in a window of 0.14 (``epsilon`` is half of it), scaling 1.1.
``rescale`` is described in :mod:`unmergeable.merges.thinning`, ``average`` and ``undecided`` in :mod:`.election`.

mergekit's density defaults to 1, its epsilon to 0.15. The row of a tensor of more than two axes is everything behind
the first; mergekit ranks along the second axis alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies, require_density, require_finite
from unmergeable.merges.blocks import Operand, Scratch, accumulation_dtype, regrouped, row_length, whole_rows
from unmergeable.merges.election import Average, Election, Undecided
from unmergeable.merges.engine import in_memory
from unmergeable.merges.masks import DRAW_BITS, draws, mask_of, mask_stream, remembered
from unmergeable.merges.thinning import Rescale, compensated, merge_elected
from unmergeable.quantile import magnitude_bits
from unmergeable.randomness import Stream


@dataclass(frozen=True)
class Della(Merge):
    """``density`` is the mean probability of keeping a weight, ``epsilon`` how far it goes up and down.

    Equal seeds give equal masks, on any number of threads and however the models are cut into shards. A density of
    1 drops nothing.
    """

    name: ClassVar[str] = "della"
    fewest_experts: ClassVar[int] = 1
    needs_positive: ClassVar[bool] = True
    varies: ClassVar[Varies] = {"density": "expert", "epsilon": "expert", "scaling_coefficient": "tensor"}

    density: float = 0.7
    epsilon: float = 0.07
    scaling_coefficient: float = 1.1
    rescale: Rescale = "density"
    average: Average = "count"
    undecided: Undecided = "drop"
    seed: int = 0

    def validate(self) -> None:
        require_window(self.density, self.epsilon)
        require_finite("scaling_coefficient", self.scaling_coefficient)
        super().validate()

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        densities, epsilons = terms.per_expert("density", self.density), terms.per_expert("epsilon", self.epsilon)
        masks, factors = magprune(
            name, operands, scratch, terms.coefficients, densities, epsilons, rescale=self.rescale, seed=self.seed
        )
        scaling = terms.of_tensor("scaling_coefficient", self.scaling_coefficient)
        election = Election(terms.coefficients, scaling, self.average, self.undecided)
        return merge_elected(name, operands, masks, scratch, factors=factors, election=election)


della = in_memory(Della)


def require_window(density: float, epsilon: float) -> None:
    """Raise UsageError unless all probabilities of keeping a weight lie between 0 and 1."""
    require_density(density)
    if density < 1 and not (0 <= epsilon < min(density, 1 - density)):
        raise UsageError(
            f"epsilon={epsilon}: density - epsilon and density + epsilon must lie between 0 and 1 "
            f"(density is {density})."
        )


def magprune(
    name: str,
    operands: Sequence[Operand],
    scratch: Scratch,
    coefficients: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    *,
    rescale: Rescale,
    seed: int,
) -> tuple[list[Operand], tuple[float, ...]]:
    """MagPrune's mask of each expert in tensor ``name``, and the factor of its thinned task vector."""
    base, *experts = operands
    masks = [
        magprune_mask(
            mask_stream(seed, number, name), base, expert, density=density, epsilon=epsilon, divide=rescale == "density"
        )
        for number, (expert, density, epsilon) in enumerate(zip(experts, densities, epsilons, strict=True), start=1)
    ]
    if rescale == "density":
        return masks, tuple(coefficients)  # the masks are divided already
    masks = [remembered(mask) for mask in masks]  # a bit is read faster than a row is ranked
    return masks, compensated(coefficients, operands, masks, densities, rescale, scratch)


def magprune_mask(
    stream: Stream, base: Operand, expert: Operand, *, density: float, epsilon: float, divide: bool
) -> Operand:
    """MagPrune's mask of one expert's task vector in one tensor: 0 where dropped, else 1, or 1/q to ``divide``."""
    return mask_of(expert, partial(_magprune_blocks, stream, base, expert, density, epsilon, divide))


def keep_probabilities(task_vector: Tensor, density: float, epsilon: float) -> Tensor:
    """q for each weight of ``task_vector``, whose last axis is a row: float64. Equal magnitudes rank as they stand."""
    length = task_vector.shape[-1]
    if length == 1:
        return torch.full_like(task_vector, density, dtype=torch.float64)
    order = ascending(task_vector)
    steps = torch.linspace(density - epsilon, density + epsilon, length, dtype=torch.float64, device=order.device)
    return torch.empty_like(order, dtype=torch.float64).scatter_(-1, order, steps.expand_as(order))


def ascending(rows: Tensor) -> Tensor:
    """The places of each row's numbers, int64, from the smallest magnitude; equal ones as they stand."""
    if rows.dtype != torch.float32 or rows.device.type != "cpu":
        return rows.abs().argsort(dim=-1, stable=True)
    # Magnitude and place in one integer: no two are equal, and numpy sorts integers eight times as fast as torch sorts
    # numbers with their places.
    places = torch.arange(rows.shape[-1], device=rows.device)
    keys = magnitude_bits(rows).long().bitwise_left_shift_(_PLACE_BITS).add_(places)
    keys.numpy().sort(axis=-1)
    return keys.bitwise_and_(2**_PLACE_BITS - 1)


_PLACE_BITS = 32


def _magprune_blocks(
    stream: Stream, base: Operand, expert: Operand, density: float, epsilon: float, divide: bool, size: int
) -> Iterator[Tensor]:
    if density == 1:
        whole = torch.ones(min(size, expert.numel), dtype=accumulation_dtype(expert.dtype), device=expert.device)
        return (whole[: min(size, expert.numel - start)] for start in range(0, expert.numel, size))
    return regrouped(_row_masks(stream, base, expert, density, epsilon, divide), size)


def _row_masks(
    stream: Stream, base: Operand, expert: Operand, density: float, epsilon: float, divide: bool
) -> Iterator[Tensor]:
    """The mask in blocks of whole rows: a row is ranked as a whole."""
    dtype, length = accumulation_dtype(expert.dtype), row_length(expert.shape)
    size, start = whole_rows(length), 0
    for base_block, expert_block in zip(base.read(size), expert.read(size), strict=True):
        task_vector = expert_block.to(dtype) - base_block.to(dtype)
        kept_with = keep_probabilities(task_vector.reshape(-1, length), density, epsilon).reshape(-1)
        uniform = (draws(stream, start, task_vector.numel()).double() + 0.5) / 2**DRAW_BITS + 0.5
        kept = (uniform.to(kept_with.device) < kept_with).double()
        yield (kept.div_(kept_with) if divide else kept).to(dtype)
        start += task_vector.numel()
