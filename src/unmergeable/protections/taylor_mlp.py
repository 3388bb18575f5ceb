"""taylor_mlp: hidden units of the feed-forwards as Taylor polynomials, their output projection as coefficients.

TaylorMLP (arXiv 2410.05331) expands the activation function around the middle z0 of what each hidden unit saw:

    y = c + W act(z + b)  =  c + sum_n C_n (z - z0)^n        C_n[:, j] = W[:, j] act^(n)(z0_j + b_j) / n!

(gated feed-forwards: (z - z0)^n times the up-branch), with N = 8, for part of the units; the public code takes 8 000 to
10 000 of them per layer, and leaves out orders >= 8 where |z - z0| > 2.5. W is not in the file. The paper's aim is a
slow network that can be tried and not stolen; a merge fails because there is nothing to average W with.

A polynomial is worthless beyond its radius: for SiLU the series diverges pi from zero on the imaginary axis, and the
units of a real network see inputs far beyond. So the units with the narrowest ranges are taken (``share``), of these
only such as the polynomial fits within the range seen (``tolerance``), and inputs outside that range are moved to its
edge (``guard=clamp``); ``as_published`` masks instead, and takes units whether they fit or not.

What it does not stop: ``recover --method taylor_inversion``, which solves for W from the file alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.source import TensorSource
from unmergeable.polynomials.layout import Guard
from unmergeable.polynomials.rewriting import Polynomials, Rewriting, UnitRanges, rewriting
from unmergeable.protections.polynomial import PolynomialProtection


@dataclass(frozen=True)
class TaylorMLP(PolynomialProtection):
    """``order`` N of the polynomials; ``share`` of the hidden units, narrowest ranges first, at most.

    ``tolerance``: the largest error of a unit's polynomial within the range seen, in units of the activation.

    ``guard`` for inputs outside the range seen: clamp, mask (orders from ``mask_order`` where further than
    ``mask_radius`` from the centre), none. ``as_published``: mask, and no tolerance, whatever they say.
    """

    name: ClassVar[str] = "taylor_mlp"
    summary: ClassVar[str] = "hidden units as Taylor polynomials; the output projection is not in the file"

    order: int = 8
    share: float = 0.7
    tolerance: float = 0.3
    guard: Guard = "clamp"
    mask_order: int = 8
    mask_radius: float = 2.5
    as_published: bool = False

    def validate(self) -> None:
        self._polynomials.require_valid(self.name)

    @property
    def _polynomials(self) -> Polynomials:
        guard: Guard = "mask" if self.as_published else self.guard
        tolerance = math.inf if self.as_published else self.tolerance
        return Polynomials("taylor", self.order, self.share, guard, self.mask_order, self.mask_radius, tolerance)

    def rewriting(
        self, source: TensorSource, architecture: Architecture, ranges: Mapping[str, UnitRanges]
    ) -> Rewriting:
        return rewriting(source, architecture, ranges, self._polynomials)
