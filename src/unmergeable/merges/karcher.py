"""``karcher``: the mean of directions on the sphere, times the mean of norms (Karcher 1977; arXiv 2603.04972).

With u_i = theta_i / |theta_i| and shares a_i that add up to 1, m starts as the direction of sum_i a_i u_i, and follows

    theta_i = angle between m and u_i
    v       = sum_i a_i (theta_i / sin theta_i) (u_i - cos(theta_i) m)
    m      <- cos(|v|) m + sin(|v|) v / |v|

until |v| < ``tolerance``, at most ``iterations`` times; theta = (sum_i a_i |theta_i|) m. The squared angles of this m
to all u_i add up to the least. Coefficients are the shares, equal where none are given.

So it is in mergekit, which knows equal shares only. A tensor that is zero in one model has no direction there and
counts for the norm alone. Of a direction opposite to m no shortest way is known; it is passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.merges.engine import in_memory
from unmergeable.merges.sphere import Weights, combination, inner_products, length_of
from unmergeable.registry import Requirements


@dataclass(frozen=True)
class Karcher(Merge):
    """``tolerance``: a smaller step ends the search; a smaller norm counts as zero."""

    name: ClassVar[str] = "karcher"
    needs_positive: ClassVar[bool] = True
    varies: ClassVar[Varies] = {"iterations": "tensor", "tolerance": "tensor"}

    iterations: int = 10
    tolerance: float = 1e-5

    def requirements(self) -> Requirements:
        return Requirements()

    def validate(self) -> None:
        if self.iterations < 0:
            raise UsageError(f"iterations={self.iterations}: must not be negative.")
        if not 0 < self.tolerance < 1:
            raise UsageError(f"tolerance={self.tolerance}: must lie between 0 and 1.")

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        products = inner_products(name, operands, "zero", scratch)
        shares = np.array(terms.coefficients) / sum(terms.coefficients)
        iterations = int(terms.of_tensor("iterations", self.iterations))
        tolerance = terms.of_tensor("tolerance", self.tolerance)
        weights = karcher_weights(products, shares, iterations, tolerance)
        return combination(name, operands, "zero", [float(weight) for weight in weights], scratch)


karcher = in_memory(Karcher)


def karcher_weights(products: Weights, shares: Weights, iterations: int, tolerance: float) -> Weights:
    """The weights of the models in the merge.

    Args:
        products: inner products of all pairs, [models, models].
        shares: of the models, adding up to 1.
        iterations: at most.
        tolerance: of a step, and of a norm.
    """
    norms = np.sqrt(np.diag(products))
    has_direction = norms > tolerance
    if not has_direction.any():
        return np.zeros(len(norms))
    scale = float(shares @ norms)
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=has_direction)
    cosines = products * np.outer(inverse, inverse)  # between directions; points are combinations of these
    shares = np.where(has_direction, shares, 0.0)
    shares = shares / shares.sum()
    mean = _unit(shares, cosines, tolerance)
    if mean is None:
        mean = np.eye(len(norms))[int(np.argmax(has_direction))]
    for _ in range(iterations):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        sines = np.sin(angles)
        has_way = has_direction & (angles >= tolerance) & (sines > tolerance)
        pulls = shares * np.divide(angles, sines, out=np.zeros_like(angles), where=has_way)
        step = pulls - float(pulls @ dots) * mean
        length = length_of(step, cosines)
        if length < tolerance:
            break
        mean = np.cos(length) * mean + np.sin(length) * step / length
        mean = mean / length_of(mean, cosines)
    return scale * mean * inverse


def _unit(point: Weights, cosines: Weights, tolerance: float) -> Weights | None:
    length = length_of(point, cosines)
    return None if length < tolerance else point / length
