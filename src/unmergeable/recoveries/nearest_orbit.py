"""nearest_orbit: the point of a checkpoint's orbit that is nearest to its base, over the largest group it may move in.

Every exact protection multiplies the weights by an element g of the architecture's symmetry group; whoever holds the
base solves

    min_g  sum over tensors  || g . theta_protected - theta_base ||^2

one space at a time (see :mod:`~unmergeable.recoveries.general_linear` and
:mod:`~unmergeable.recoveries.closed_forms`), and applies the answer. The result is the same function. The expert is
in the orbit too, so the orbit's nearest point is no further from the base than the expert was before it was protected:
this is why no exact protection stops somebody who holds the base.

Covered so far: queries and keys, values and output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.elements import Dense
from unmergeable.progress import Progress, silent
from unmergeable.recoveries.closed_forms import (
    nearest_block_scale,
    nearest_block_sign,
    nearest_diagonal,
    nearest_pair_scale,
    nearest_pair_sign,
    nearest_positive_diagonal,
    nearest_quarter_turn,
    nearest_rotary,
)
from unmergeable.recoveries.estimate import Nearest, estimate_gauge
from unmergeable.recoveries.general_linear import nearest_general_linear
from unmergeable.recoveries.moments import LegPair, dense_moments
from unmergeable.recoveries.recovery import Estimate


@dataclass(frozen=True)
class NearestOrbit:
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
        """The bases it estimates: all those of attention."""
        return architecture.symmetry.select("query_key", "value_output", negligible_epsilon=self.negligible_epsilon)

    def estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
    ) -> Estimate:
        """The gauge that brings ``protected`` nearest to ``base``, and the distances it leaves.

        Raises:
            Mismatch: when the checkpoints do not hold the same attention tensors.
            BadInput: when one of them holds NaN or infinity.
        """
        return estimate_gauge(protected, base, architecture, NEAREST, self.spaces(architecture), progress)


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
