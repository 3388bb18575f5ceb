"""``multislerp``: several models interpolated on a sphere, in the tangent space at their mean (mergekit).

With x_i = theta_i, or theta_i - theta_0 where ``origin`` is the base, u_i = x_i / |x_i| and shares a_i:

    m     = the direction of sum_i a_i u_i
    v     = sum_i a_i (u_i - <u_i, m> m)
    x     = (sum_i a_i |x_i|) (cos(|v|) m + sin(|v|) v / |v|)

Coefficients are the shares: divided by their sum with ``normalize``, as they are without. Directions that cancel have
no mean: two models are interpolated linearly then, more are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from unmergeable.errors import BadInput
from unmergeable.merges.base import Merge, Terms
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.merges.engine import in_memory
from unmergeable.merges.sphere import Origin, Weights, combination, inner_products, length_of, requirements_of
from unmergeable.registry import Requirements

_SMALLEST = 1e-8
"""Added to lengths before they divide, as in mergekit; a shorter mean has no direction."""


@dataclass(frozen=True)
class MultiSlerp(Merge):
    """``origin``: the centre of the sphere, the "base" or "zero"."""

    name: ClassVar[str] = "multislerp"
    needs_positive: ClassVar[bool] = True

    origin: Origin = "base"
    normalize: bool = True

    def requirements(self) -> Requirements:
        return requirements_of(self.origin)

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        products = inner_products(operands, self.origin, scratch)
        shares = np.array(terms.coefficients)
        weights = multislerp_weights(products, shares / shares.sum() if self.normalize else shares)
        if weights is None:
            raise BadInput(
                f"{name}: the models' directions cancel each other, and have no mean; change the coefficients."
            )
        return combination(name, operands, self.origin, [float(weight) for weight in weights], scratch)


multislerp = in_memory(MultiSlerp)


def multislerp_weights(products: Weights, shares: Weights) -> Weights | None:
    """The weights of the models in the merge; None where more than two directions cancel.

    Args:
        products: inner products of all pairs, as seen from the origin, [models, models].
        shares: of the models.
    """
    norms = np.sqrt(np.diag(products))
    if not norms.any():
        return shares  # all are where the origin is
    inverse = 1 / (norms + _SMALLEST)
    cosines = products * np.outer(inverse, inverse)
    length = length_of(shares, cosines)
    if length < _SMALLEST:
        return shares if len(shares) == 2 else None
    mean = shares / length
    tangent = shares - float(shares @ cosines @ mean) * mean
    angle = length_of(tangent, cosines) + _SMALLEST
    point = np.cos(angle) * mean + np.sin(angle) / angle * tangent
    weights: Weights = float(shares @ norms) * point * inverse
    return weights
