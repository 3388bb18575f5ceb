"""``breadcrumbs_ties``: drop the smallest and the very largest weights of the task vectors, then merge as TIES does.

The masks m_i are those of ``breadcrumbs``, ranked within each tensor; signs are elected among the c_i m_i tau_i as in
``ties`` (:mod:`unmergeable.merges.election`). mergekit has this combination, no paper does; density and gamma default
to those of ``breadcrumbs``, mergekit's to 1 and 0.01.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.merges.base import Merge, Terms, Varies, require_finite
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks
from unmergeable.merges.breadcrumbs import Cut, crumbs, kept_band, require_band, tensor_cuts
from unmergeable.merges.election import SPARE, Average, Election, Undecided
from unmergeable.merges.engine import in_memory


@dataclass(frozen=True)
class BreadcrumbsTies(Merge):
    """``density`` is the fraction kept, ``gamma`` the fraction of outliers."""

    name: ClassVar[str] = "breadcrumbs_ties"
    fewest_experts: ClassVar[int] = 1
    needs_positive: ClassVar[bool] = True
    varies: ClassVar[Varies] = {"density": "expert", "gamma": "expert", "scaling_coefficient": "tensor"}

    density: float = 0.15
    gamma: float = 0.006
    scaling_coefficient: float = 1.0
    average: Average = "count"
    undecided: Undecided = "drop"

    def validate(self) -> None:
        require_band(self.density, self.gamma)
        require_finite("scaling_coefficient", self.scaling_coefficient)
        super().validate()

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        densities, gammas = terms.per_expert("density", self.density), terms.per_expert("gamma", self.gamma)
        bands = [kept_band(*fractions, operands[0].numel) for fractions in zip(densities, gammas, strict=True)]
        scaling = terms.of_tensor("scaling_coefficient", self.scaling_coefficient)
        election = Election(terms.coefficients, scaling, self.average, self.undecided)
        kernel = partial(_merge_block, cuts=tensor_cuts(operands, bands, scratch), election=election)
        return merge_blocks(name, operands, kernel, scratch, spare=SPARE)


breadcrumbs_ties = in_memory(BreadcrumbsTies)


def _merge_block(
    blocks: list[Tensor], spare: list[Tensor], *, cuts: Sequence[Cut | None], election: Election
) -> Tensor:
    base, *experts = blocks
    crumbs(base, experts, cuts, spare[0])
    for expert, coefficient in zip(experts, election.coefficients, strict=True):
        expert.mul_(coefficient)
    return election.add(base, experts, spare)
