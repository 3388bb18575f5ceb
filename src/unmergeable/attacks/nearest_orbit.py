"""nearest_orbit: the point of a checkpoint's orbit that is nearest to its base, over the largest group it may move in.

Every exact protection multiplies the weights by an element g of the architecture's symmetry group; whoever holds the
base solves

    min_g  sum over tensors  || g . theta_protected - theta_base ||^2

and applies the answer. The result is the same function. The expert is in the orbit too, so the orbit's nearest point
is no further from the base than the expert was before it was protected: this is why no exact protection stops somebody
who holds the base.

From the outside in, each compared by what the later ones do not alter: the residual stream and the gains of its norms
(:mod:`~unmergeable.attacks.residual_stream`); the order of experts, heads and hidden units
(:mod:`~unmergeable.attacks.orders`); the bases of heads (:mod:`~unmergeable.attacks.general_linear`) and the
scales of everything (:mod:`~unmergeable.attacks.closed_forms`). An order is recognised, not optimised: it is the
planted one as long as a head or unit resembles its origin more than any other, which at real widths it does however far
a fine-tune goes. The stream is only touched where the embedding or the gains show that it was moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.symmetry import GroupKind, Role
from unmergeable.attacks.base import Estimate, GaugeAttack
from unmergeable.attacks.closed_forms import (
    nearest_block_scale,
    nearest_block_sign,
    nearest_diagonal,
    nearest_pair_scale,
    nearest_pair_sign,
    nearest_positive_diagonal,
    nearest_quarter_turn,
    nearest_rotary,
)
from unmergeable.attacks.estimate import Nearest, Solvers, estimate_gauges
from unmergeable.attacks.general_linear import nearest_general_linear
from unmergeable.attacks.kabsch import NEAREST_ISOMETRY
from unmergeable.attacks.moments import LegPair, dense_moments
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.elements import Dense
from unmergeable.progress import Progress, silent

ROLES: tuple[Role, ...] = ("query_key", "value_output", "heads", "feed_forward", "experts", "norm", "residual")


@dataclass(frozen=True)
class NearestOrbit(GaugeAttack):
    """``negligible_epsilon``: also estimate the scales that a norm on queries and keys removes up to its epsilon.

    They bring a checkpoint nearer, and change its function by about the epsilon.
    """

    name: ClassVar[str] = "nearest_orbit"
    summary: ClassVar[str] = "the nearest point to the base that computes the same function"
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("base",)

    negligible_epsilon: bool = False

    def validate(self) -> None:
        """Every combination of settings is valid."""

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """What it estimates: every order and every basis that the architecture's map declares."""
        return architecture.symmetry.select(*ROLES, negligible_epsilon=self.negligible_epsilon, folding=True)

    def estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
    ) -> Estimate:
        """The gauges that bring ``protected`` nearest to ``base``, and the distances they leave.

        Raises:
            Mismatch: when the checkpoints do not hold the same tensors in attention and feed-forward.
            BadInput: when one of them holds NaN or infinity.
        """
        return estimate_gauges(protected, base, architecture, Solvers(NEAREST), self.spaces(architecture), progress)


def _nearest_dense(space: Space, legs: Sequence[LegPair]) -> Dense:
    vectors, covectors = (dense_moments(space, legs, variance) for variance in ("vector", "covector"))
    return Dense(nearest_general_linear(vectors, covectors))


NEAREST: dict[GroupKind, Nearest] = {
    "general_linear": _nearest_dense,
    "orthogonal": NEAREST_ISOMETRY["orthogonal"],
    "rotary": nearest_rotary,
    "quarter_turn": nearest_quarter_turn,
    "pair_sign": nearest_pair_sign,
    "pair_scale": nearest_pair_scale,
    "block_scale": nearest_block_scale,
    "block_sign": nearest_block_sign,
    "positive_diagonal": nearest_positive_diagonal,
    "diagonal": nearest_diagonal,
}
