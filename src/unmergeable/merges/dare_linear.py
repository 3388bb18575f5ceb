"""``dare_linear``: drop weights of the task vectors at random, rescale the rest, add (DARE, arXiv 2311.03099).

With m_i independent Bernoulli masks of probability ``density`` (the paper's 1 - p):

    theta = theta_0 + sum_i lambda_i (m_i / density) (theta_i - theta_0)

The factor 1/density keeps the expectation. The default density of 0.8 is the drop rate of 0.2 with which the authors
merge language models (they drop 0.9 and more without loss from single ones); their lambda is 1.

mergekit's variant is ``rescale="norm"``: the factor that gives each tensor of a task vector its L1 norm back. Its
density defaults to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmergeable.merges.base import Merge, Terms, Varies, fill_coefficients, require_density, require_finite
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.merges.engine import in_memory
from unmergeable.merges.thinning import Rescale, bernoulli_masks, compensated, merge_thinned


@dataclass(frozen=True)
class DareLinear(Merge):
    """``density`` is the probability of keeping a weight; ``scaling_coefficient`` the default lambda.

    Equal seeds give equal masks, on any number of threads and however the models are cut into shards.
    """

    name: ClassVar[str] = "dare_linear"
    fewest_experts: ClassVar[int] = 1
    varies: ClassVar[Varies] = {"density": "expert"}

    density: float = 0.8
    scaling_coefficient: float = 1.0
    rescale: Rescale = "density"
    seed: int = 0

    def validate(self) -> None:
        require_density(self.density)
        require_finite("scaling_coefficient", self.scaling_coefficient)
        super().validate()

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        return fill_coefficients(coefficients, default=self.scaling_coefficient)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        densities = terms.per_expert("density", self.density)
        masks = bernoulli_masks(name, operands, densities, self.seed, self.rescale)
        factors = compensated(terms.coefficients, operands, masks, densities, self.rescale, scratch)
        return merge_thinned(name, operands, masks, scratch, factors=factors)


dare_linear = in_memory(DareLinear)
