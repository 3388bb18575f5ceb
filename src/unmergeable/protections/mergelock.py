"""MergeLock: secret invertible matrices between queries and keys, and between values and output (arXiv 2509.01548).

Per layer and head, with A and B drawn from the key,

    Q' = A Q    K' = A^-T K        q'.k' = (A q)^T (A^-T k) = q.k
    V' = B V    O' = O B^-1        O' softmax(.) V' = O softmax(.) V

and biases follow their rows (eqs. 4-7 of the paper). Each matrix is A = R P D: a rotation, a permutation, a diagonal.
The paper does not publish their distributions; here R is Haar, P uniform, D log-uniform with condition number at
most ``condition``. The network computes the same; a merge averages weights expressed in different bases.

Where the architecture leaves less than GL, the largest group it does leave is drawn from instead: under rotary
positions one complex number per frequency pair, behind a norm on queries and keys the signs and the gains. Under
grouped-query attention one A and one B serve a key-value head with all its query heads. The paper's formulas know no
positions: ``as_published`` draws an invertible A under rotary positions too, which changes the function.

``quantisation=kept`` draws from what is left when weights that are quantised together stay together
(:mod:`unmergeable.gauge.grouped`): orders, signs and quarter turns. It is what ``protect`` takes by itself.

What it does not stop: somebody who holds the base model. The base says which basis the heads started in, and the
rotation back is a least-squares problem per head (``recover --method nearest_orbit``), solved in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from unmergeable.architecture import Architecture, Space
from unmergeable.gauge.gauge import Gauge, sampled_gauge
from unmergeable.gauge.grouped import kept_gauge, kept_spaces
from unmergeable.protections.exact import ExactProtection, Quantisation, Weights, without_positions
from unmergeable.randomness import Stream
from unmergeable.settings import ADDED_LATER


@dataclass(frozen=True)
class MergeLock(ExactProtection):
    """``condition``: bound on the condition number of each matrix; rounding errors grow with it.

    ``cross_attention``: also transform encoder-decoder and text-conditioning attention; the paper leaves it alone.
    ``as_published``: leave it alone whatever ``cross_attention`` says, and take any invertible matrix under rotary
    positions, where it is not exact. ``quantisation``: ``kept``, or ``free`` for any matrix within ``condition``.
    ``part``: the only part of a network of several that is changed; empty for all.
    """

    name: ClassVar[str] = "mergelock"
    summary: ClassVar[str] = "secret change of basis inside every attention head"

    condition: float = 4.0
    cross_attention: bool = True
    as_published: bool = False
    quantisation: Quantisation = field(default="free", metadata=ADDED_LATER)
    part: str = field(default="", metadata=ADDED_LATER)

    def validate(self) -> None:
        self.require(1 <= self.condition <= 1000, "condition", "lie between 1 and 1000")
        self.require_free("as_published")

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        cross_attention = self.cross_attention and not self.as_published
        found = architecture.symmetry.select("query_key", "value_output", cross_attention=cross_attention)
        found = kept_spaces(found, architecture.symmetry) if self.is_kept else found
        return without_positions(found, "general_linear") if self.as_published else found

    @property
    def bound(self) -> float:
        return 1.0 if self.is_kept else self.condition

    def gauge(self, architecture: Architecture, stream: Stream) -> Gauge:
        """A secret element for every space, drawn from ``stream``."""
        spaces = self.spaces(architecture)
        if self.is_kept:
            return kept_gauge(spaces, architecture.symmetry, stream)
        return sampled_gauge(spaces, stream, self.condition)

    def gauges(self, architecture: Architecture, stream: Stream, weights: Weights) -> tuple[Gauge, ...]:
        return (self.gauge(architecture, stream),)
