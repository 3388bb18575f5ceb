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
from unmergeable.attacks.estimate import GaugeAttack, Solvers
from unmergeable.attacks.hidden_units import permuted_similarity
from unmergeable.attacks.in_memory import fit_in_memory


@dataclass(frozen=True)
class NeuronMatching(GaugeAttack):
    """The Hungarian step alone; no settings."""

    name: ClassVar[str] = "neuron_matching"
    summary: ClassVar[str] = "hidden units of every feed-forward back in the base's order"

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The permutations of hidden units."""
        spaces = architecture.symmetry.select("feed_forward")
        return {name: space for name, space in spaces.items() if space.group.kind == "permutation"}

    @property
    def solvers(self) -> Solvers:
        return Solvers(unit_similarity=permuted_similarity)


neuron_matching = fit_in_memory(NeuronMatching)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
