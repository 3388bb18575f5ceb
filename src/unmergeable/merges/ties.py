"""``ties``: trim, elect sign, disjoint merge (TIES-Merging, arXiv 2306.01708).

With tau_i = theta_i - theta_0, and per weight p:

    trim      keep tau_i[p] where |tau_i[p]| is in the largest ``density`` of tau_i, else 0
    elect     s[p] = sign(sum_i c_i tau_i[p])
    merge     tau[p] = mean of c_i tau_i[p] over the kept experts whose sign is s[p]
    theta     = theta_0 + scaling_coefficient * tau

The defaults (density 0.2 over the whole task vector, c_i = 1, scaling 1) are the paper's "k = 20, lambda = 1".
The threshold is one per task vector (``trim="global"``, the paper's) or one per tensor (``"tensor"``, mergekit's);
``average`` and ``undecided`` are described in :mod:`unmergeable.merges.election`.

Of equal magnitudes at the threshold all are kept, as in the authors' code. mergekit keeps an exact number of them,
and an unstable sort chooses which; its density defaults to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.merges.base import Inputs, Merge, TensorMerge, TermsOf, Varies, require_density, require_finite
from unmergeable.merges.blocks import Operand, Scratch, accumulation_dtype, merge_blocks
from unmergeable.merges.election import SPARE, Average, Election, Undecided
from unmergeable.merges.engine import in_memory
from unmergeable.merges.magnitudes import (
    Magnitudes,
    Ranks,
    largest_below,
    model_densities,
    model_magnitudes,
    rank_kept,
    tensor_magnitudes,
)

Trim = Literal["global", "tensor"]


@dataclass(frozen=True)
class Ties(Merge):
    """``density`` is the fraction of each task vector that is kept; the module describes the other settings."""

    name: ClassVar[str] = "ties"
    fewest_experts: ClassVar[int] = 1
    needs_positive: ClassVar[bool] = True
    varies: ClassVar[Varies] = {"density": "expert", "scaling_coefficient": "tensor"}

    density: float = 0.2
    scaling_coefficient: float = 1.0
    trim: Trim = "global"
    average: Average = "count"
    undecided: Undecided = "drop"

    def validate(self) -> None:
        require_density(self.density)
        require_finite("scaling_coefficient", self.scaling_coefficient)
        super().validate()

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        model_thresholds = None
        if self.trim == "global":
            model_thresholds = global_thresholds(inputs, model_densities(inputs, terms, self.density))

        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            tensor_terms = terms(name)
            thresholds = model_thresholds
            if thresholds is None:
                thresholds = tensor_thresholds(operands, tensor_terms.per_expert("density", self.density), scratch)
            scaling = tensor_terms.of_tensor("scaling_coefficient", self.scaling_coefficient)
            election = Election(tensor_terms.coefficients, scaling, self.average, self.undecided)
            return merge_tensor(name, operands, scratch, thresholds=thresholds, election=election)

        return merge


ties = in_memory(Ties)


def merge_tensor(
    name: str, operands: Sequence[Operand], scratch: Scratch, *, thresholds: Sequence[float], election: Election
) -> Tensor:
    """The TIES merge of a base and its experts, whose task vectors are trimmed below ``thresholds``."""
    # hardshrink keeps what is strictly larger than its argument.
    cuts = [largest_below(threshold, accumulation_dtype(operands[0].dtype)) for threshold in thresholds]
    kernel = partial(_merge_block, cuts=cuts, election=election)
    return merge_blocks(name, operands, kernel, scratch, spare=SPARE)


def global_thresholds(inputs: Inputs, densities: Sequence[float]) -> tuple[float, ...]:
    """Per expert, the magnitude that its density of the weights of its task vector reach: exact, streamed."""
    size = sum(inputs.operands(name)[0].numel for name in inputs.names)
    return _thresholds(size, densities, lambda ranks: model_magnitudes(inputs, ranks))


def tensor_thresholds(operands: Sequence[Operand], densities: Sequence[float], scratch: Scratch) -> tuple[float, ...]:
    """The same among the weights of one tensor."""
    return _thresholds(operands[0].numel, densities, lambda ranks: tensor_magnitudes(operands, ranks, scratch))


def _thresholds(size: int, densities: Sequence[float], magnitudes: Callable[[Ranks], Magnitudes]) -> tuple[float, ...]:
    if size == 0 or all(density == 1 for density in densities):
        return (0.0,) * len(densities)  # trims nothing
    return tuple(value for (value,) in magnitudes([(rank_kept(density, size),) for density in densities]))


def _merge_block(
    blocks: list[Tensor], spare: list[Tensor], *, cuts: Sequence[float | None], election: Election
) -> Tensor:
    base, *experts = blocks
    for expert, coefficient, cut in zip(experts, election.coefficients, cuts, strict=True):
        expert.sub_(base)
        if cut is not None:
            torch.hardshrink(expert, cut, out=expert)
        if coefficient != 1:
            expert.mul_(coefficient)
    return election.add(base, experts, spare)
