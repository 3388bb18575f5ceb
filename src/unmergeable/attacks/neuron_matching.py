"""neuron_matching: the hidden units of every feed-forward put back in the base's order, and nothing else.

The attack that PaRaMS (arXiv 2503.07661) is evaluated against: per feed-forward the permutation that maximises

    sum_i <u_i, u0_pi(i)> + <g_i, g0_pi(i)> + <d_i, d0_pi(i)>

over rows of the up and gate projections (with biases) and columns of the down projection, a linear sum assignment
problem. It undoes a permutation and nothing else: under scales of hidden units the inner products mislead it where
``nearest_orbit`` compares what no scale changes, and attention stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unmergeable.architecture import Architecture, Space
from unmergeable.attacks.base import Estimate, GaugeAttack
from unmergeable.attacks.estimate import Solvers, estimate_gauges
from unmergeable.attacks.orders import reordered_similarity
from unmergeable.checkpoint.source import TensorSource
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class NeuronMatching(GaugeAttack):
    """The Hungarian step alone; no settings."""

    name: ClassVar[str] = "neuron_matching"
    summary: ClassVar[str] = "hidden units of every feed-forward back in the base's order"
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("base",)

    def validate(self) -> None:
        """There is nothing to set."""

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The orders of hidden units."""
        spaces = architecture.symmetry.select("feed_forward")
        return {name: space for name, space in spaces.items() if space.group.kind == "permutation"}

    def estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
    ) -> Estimate:
        """The orders that bring ``protected`` nearest to ``base``, and the distances they leave.

        Raises:
            Mismatch: when the checkpoints do not hold the same feed-forward tensors.
            BadInput: when one of them holds NaN or infinity.
        """
        solvers = Solvers({}, reordered_similarity)
        return estimate_gauges(protected, base, architecture, solvers, self.spaces(architecture), progress)
