"""``dare_ties``: drop weights of the task vectors at random, rescale the rest, merge as TIES does.

DARE (arXiv 2311.03099) as a plug-in of TIES-Merging (arXiv 2306.01708): the random drop takes the place of the trim,
and election and disjoint mean follow. With m_i independent Bernoulli masks of probability ``density``:

    t_i   = (m_i / density) (theta_i - theta_0)
    s     = sign(sum_i c_i t_i)
    tau   = mean of c_i t_i over the experts whose sign is s
    theta = theta_0 + scaling_coefficient * tau

The default density of 0.8 is the drop rate of 0.2 with which the authors merge language models.

=============  ==========================================================  =======================================
setting        papers                                                      mergekit
=============  ==========================================================  =======================================
``rescale``    ``density``: by 1/density                                   ``norm``: back to the L1 norm, per tensor
``average``    ``count``: divide by the number of experts that agree       ``sum``: do not divide
``undecided``  ``drop``: a mass of exactly 0 elects nobody                 ``positive``: it elects +
=============  ==========================================================  =======================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from unmergeable.merges.base import Inputs, TensorMerge, TermsOf, positive_coefficients, require_density, require_finite
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.merges.election import Average, Undecided, require_election
from unmergeable.merges.thinning import Rescale, bernoulli_masks, compensated, merge_elected, require_rescale


@dataclass(frozen=True)
class DareTies:
    """``density`` is the probability of keeping a weight; the module's table has the other settings.

    Equal seeds give equal masks, on any number of threads and however the models are cut into shards.
    """

    name: ClassVar[str] = "dare_ties"
    needs_base: ClassVar[bool] = True
    fewest_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = None
    varies: ClassVar[Mapping[str, Literal["expert", "tensor"]]] = {"density": "expert", "scaling_coefficient": "tensor"}

    density: float = 0.8
    scaling_coefficient: float = 1.0
    rescale: Rescale = "density"
    average: Average = "count"
    undecided: Undecided = "drop"
    seed: int = 0

    def validate(self) -> None:
        require_density(self.density)
        require_finite("scaling_coefficient", self.scaling_coefficient)
        require_rescale(self.rescale)
        require_election(self.average, self.undecided)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """The c_i, 1 by default. Raises UsageError for a negative one: it would vote against its own expert."""
        return positive_coefficients(self.name, coefficients)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            its = terms(name)
            densities = its.per_expert("density", self.density)
            masks = bernoulli_masks(name, operands, densities, self.seed, self.rescale)
            return merge_elected(
                name,
                operands,
                masks,
                scratch,
                factors=compensated(its.coefficients, operands, masks, densities, self.rescale, scratch),
                coefficients=its.coefficients,
                scaling_coefficient=its.of_tensor("scaling_coefficient", self.scaling_coefficient),
                average=self.average,
                undecided=self.undecided,
            )

        return merge
