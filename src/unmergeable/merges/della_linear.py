"""``della_linear``: drop weights at random, the smaller the likelier, and add (DELLA without election; mergekit).

With t_i the task vectors thinned by MagPrune (:mod:`unmergeable.merges.della`) and their coefficients lambda_i:

    theta = theta_0 + sum_i lambda_i t_i

Defaults of density and epsilon are those of ``della``; mergekit's are 1 and 0.15.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unmergeable.merges.base import Merge, Terms, Varies
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.merges.della import magprune, require_window
from unmergeable.merges.engine import in_memory
from unmergeable.merges.thinning import Rescale, merge_thinned


@dataclass(frozen=True)
class DellaLinear(Merge):
    """``density`` is the mean probability of keeping a weight, ``epsilon`` how far it goes up and down."""

    name: ClassVar[str] = "della_linear"
    fewest_experts: ClassVar[int] = 1
    varies: ClassVar[Varies] = {"density": "expert", "epsilon": "expert"}

    density: float = 0.7
    epsilon: float = 0.07
    rescale: Rescale = "density"
    seed: int = 0

    def validate(self) -> None:
        require_window(self.density, self.epsilon)
        super().validate()

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        densities, epsilons = terms.per_expert("density", self.density), terms.per_expert("epsilon", self.epsilon)
        masks, factors = magprune(
            name, operands, scratch, terms.coefficients, densities, epsilons, rescale=self.rescale, seed=self.seed
        )
        return merge_thinned(name, operands, masks, scratch, factors=factors)


della_linear = in_memory(DellaLinear)
