"""nearest_orbit: the point of a checkpoint's orbit that is nearest to its base, over the largest group it may move in.

Every exact protection multiplies the weights by an element g of the architecture's symmetry group; whoever holds the
base solves

    min_g  sum over tensors  || g . theta_protected - theta_base ||^2

and applies the answer. The result is the same function. The expert is in the orbit too, so the orbit's nearest point
is no further from the base than the expert was before it was protected: this is why no exact protection stops somebody
who holds the base.

From the outside in, each compared by what the later ones do not alter: the residual stream and the gains of its norms
(:mod:`~unmergeable.attacks.residual_stream`); the permutations of experts, heads and hidden units
(:mod:`~unmergeable.attacks.permutations`); the bases of heads (:mod:`~unmergeable.attacks.general_linear`) and the
scales of everything (:mod:`~unmergeable.attacks.closed_forms`). A permutation is recognised, not optimised: it is the
planted one as long as a head or unit resembles its origin more than any other, which at real widths it does however far
a fine-tune goes. The stream is only touched where the embedding or the gains show that it was moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.symmetry import GroupKind, Role
from unmergeable.attacks.base import AttackRequirements
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
from unmergeable.attacks.estimate import GaugeAttack, Nearest, Solvers
from unmergeable.attacks.general_linear import nearest_general_linear
from unmergeable.attacks.in_memory import fit_in_memory
from unmergeable.attacks.moments import LegPair, dense_moments
from unmergeable.gauge.elements import Dense

ROLES: tuple[Role, ...] = ("query_key", "value_output", "heads", "feed_forward", "experts", "norm", "residual")


@dataclass(frozen=True)
class NearestOrbit(GaugeAttack):
    """``negligible_epsilon``: also estimate the scales that a norm on queries and keys removes up to its epsilon.

    They bring a checkpoint nearer, and change its function by about the epsilon: the attack is then not exact.
    """

    name: ClassVar[str] = "nearest_orbit"
    summary: ClassVar[str] = "the nearest point to the base that computes the same function"

    negligible_epsilon: bool = False

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(exact=not self.negligible_epsilon, needs=("base",))

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """Every permutation and every basis that the architecture's map declares."""
        return architecture.symmetry.select(*ROLES, negligible_epsilon=self.negligible_epsilon, folding=True)

    @property
    def solvers(self) -> Solvers:
        return Solvers(NEAREST)


def _nearest_dense(space: Space, legs: Sequence[LegPair]) -> Dense:
    vectors, covectors = (dense_moments(space, legs, variance) for variance in ("vector", "covector"))
    return Dense(nearest_general_linear(vectors, covectors))


NEAREST: dict[GroupKind, Nearest] = {
    "general_linear": _nearest_dense,
    "rotary": nearest_rotary,
    "quarter_turn": nearest_quarter_turn,
    "pair_sign": nearest_pair_sign,
    "pair_scale": nearest_pair_scale,
    "block_scale": nearest_block_scale,
    "block_sign": nearest_block_sign,
    "positive_diagonal": nearest_positive_diagonal,
    "diagonal": nearest_diagonal,
}


nearest_orbit = fit_in_memory(NearestOrbit)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
