"""``dare_ties``: drop weights of the task vectors at random, rescale the rest, merge as TIES does.

DARE (arXiv 2311.03099) as a plug-in of TIES-Merging (arXiv 2306.01708): the random drop takes the place of the trim,
and election and disjoint mean follow. With m_i independent Bernoulli masks of probability ``density``:

    t_i   = (m_i / density) (theta_i - theta_0)
    s     = sign(sum_i c_i t_i)
    tau   = mean of c_i t_i over the experts whose sign is s
    theta = theta_0 + scaling_coefficient * tau

The default density of 0.8 is the drop rate of 0.2 with which the authors merge language models.
mergekit rescales to the L1 norm (``rescale="norm"``), does not divide (``average="sum"``), and lets a mass of 0 elect +
(``undecided="positive"``); see :mod:`unmergeable.merges.thinning` and :mod:`unmergeable.merges.election`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmergeable.merges.base import Merge, Terms, Varies, require_density, require_finite
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.merges.election import Average, Election, Undecided
from unmergeable.merges.engine import in_memory
from unmergeable.merges.thinning import Rescale, bernoulli_masks, compensated, merge_elected


@dataclass(frozen=True)
class DareTies(Merge):
    """``density`` is the probability of keeping a weight; the module describes the other settings.

    Equal seeds give equal masks, on any number of threads and however the models are cut into shards.
    """

    name: ClassVar[str] = "dare_ties"
    fewest_experts: ClassVar[int] = 1
    needs_positive: ClassVar[bool] = True
    varies: ClassVar[Varies] = {"density": "expert", "scaling_coefficient": "tensor"}

    density: float = 0.8
    scaling_coefficient: float = 1.0
    rescale: Rescale = "density"
    average: Average = "count"
    undecided: Undecided = "drop"
    seed: int = 0

    def validate(self) -> None:
        require_density(self.density)
        require_finite("scaling_coefficient", self.scaling_coefficient)
        super().validate()

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        densities = terms.per_expert("density", self.density)
        masks = bernoulli_masks(name, operands, densities, self.seed, self.rescale)
        factors = compensated(terms.coefficients, operands, masks, densities, self.rescale, scratch)
        scaling = terms.of_tensor("scaling_coefficient", self.scaling_coefficient)
        election = Election(terms.coefficients, scaling, self.average, self.undecided)
        return merge_elected(name, operands, masks, scratch, factors=factors, election=election)


dare_ties = in_memory(DareTies)
