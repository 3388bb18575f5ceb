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

Biases, gains and scales may have been traded between tensors besides, which is no change of basis. Where there are
traces of it (:mod:`~unmergeable.attacks.canonicalise`) the bases are found between the neutral forms of both
checkpoints, which no trade alters, and the result is kept if it is nearer by more than the numbers it fits explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.symmetry import GroupKind, Role
from unmergeable.attacks.base import AttackRequirements, Estimate
from unmergeable.attacks.canonicalise import POSITION_BIAS, SUMMED, balanced, is_comparable, traces
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
from unmergeable.attacks.distance import part_distance, parts
from unmergeable.attacks.estimate import GaugeAttack, Nearest, Solvers, estimate_gauges
from unmergeable.attacks.general_linear import nearest_general_linear
from unmergeable.attacks.in_memory import fit_in_memory
from unmergeable.attacks.kabsch import NEAREST_ISOMETRY
from unmergeable.attacks.moments import LegPair, dense_moments
from unmergeable.attacks.reading import GaugedSource, Reader
from unmergeable.attacks.residual_stream import find_stream
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.additive import Freedoms, Neutral, freedoms_of
from unmergeable.gauge.elements import Dense
from unmergeable.gauge.home import AsStored, Home
from unmergeable.progress import Progress, silent

CLEARLY = 0.1
"""Share of what an estimate leaves unexplained that undoing trades has to explain."""

ROLES: tuple[Role, ...] = ("query_key", "value_output", "heads", "feed_forward", "experts", "norm", "residual")


@dataclass(frozen=True)
class NearestOrbit(GaugeAttack):
    """``negligible_epsilon``: also estimate the scales that a norm on queries and keys removes up to its epsilon.

    They bring a checkpoint nearer, and change its function by about the epsilon: the attack is then not exact. They are
    estimated in any case where nothing is recognised without them.
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

    def estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
    ) -> Estimate:
        """As :meth:`GaugeAttack.estimate`, with a ``template`` where undoing trades brings the base clearly nearer.

        Where nothing is recognised, scales that a norm on queries and keys removes are looked for as well.
        """
        found = self._estimate(protected, base, architecture, progress)
        is_normed = any(block.norm is not None for block in architecture.attentions)
        if found.confidence > 0 or self.negligible_epsilon or not is_normed:
            return found
        scaled = replace(self, negligible_epsilon=True)._estimate(protected, base, architecture, progress)
        return scaled if scaled.confidence > 0 else found

    def _estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress
    ) -> Estimate:
        source, scales = balanced(protected, base, architecture)
        spaces = self.spaces(architecture)
        ours, theirs = (Reader(side, architecture.symmetry) for side in (source, base))
        stream = find_stream(ours, theirs, architecture, spaces)
        estimate = estimate_gauges(source, base, architecture, self.solvers, spaces, progress, stream)
        if scales.spaces:
            before = [part_distance(part, protected.tensor, base.tensor) for part in parts(architecture)]
            fits = (replace(fit, before=stored) for fit, stored in zip(estimate.fits, before, strict=True))
            estimate = Estimate((scales, *estimate.gauges), tuple(fits))
        freedoms = freedoms_of(architecture, protected.names)
        traded = traces(GaugedSource(source, ours.under(*stream.gauges)), base, freedoms)
        if not traded:
            return estimate
        home = self._without_trades(source, base, architecture, freedoms, progress)
        at_home = super().estimate(home, base, architecture, progress)
        template = AsStored(GaugedSource(home, Reader(home, architecture.symmetry).under(*at_home.gauges)))
        fitted = freedoms.count(protected) // len(at_home.fits)
        fits = (
            replace(fit, before=stored.before, freedoms=fit.freedoms + fitted)
            for fit, stored in zip(at_home.fits, estimate.fits, strict=True)
        )
        undone = Estimate((), tuple(fits), template, traded)
        is_nearer = 1 - undone.confidence < (1 - CLEARLY) * (1 - estimate.confidence)
        beside = [name for name in (*freedoms.summed, *freedoms.position_biases) if is_comparable(name, source, base)]
        if not is_nearer and {SUMMED, POSITION_BIAS} & set(traded) and undone.after <= (1 + CLEARLY) * estimate.after:
            # These lie in no part of a block.
            as_stored = GaugedSource(source, ours.under(*estimate.gauges))
            is_nearer = _distance(template, base, beside) < (1 - CLEARLY) * _distance(as_stored, base, beside)
        return undone if is_nearer else estimate

    def _without_trades(
        self,
        source: TensorSource,
        base: TensorSource,
        architecture: Architecture,
        freedoms: Freedoms,
        progress: Progress,
    ) -> Home:
        """``source`` in the basis nearest to ``base``, with the constants, gains and scales of ``base``.

        Neutral forms weigh columns by gains. What is fitted between them is near enough to find the base's gains; the
        bases are to be fitted once more to the result.
        """
        neutral = Neutral(source, freedoms)
        gauges = super().estimate(neutral, Neutral(base, freedoms), architecture, progress).gauges
        return Home(source, freedoms, base, Reader(neutral, architecture.symmetry).under(*gauges).read)


def _distance(source: TensorSource, base: TensorSource, names: Sequence[str]) -> float:
    """Of these tensors, the sum of squares."""
    return sum(float((source.tensor(name).double() - base.tensor(name).double()).square().sum()) for name in names)


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


nearest_orbit = fit_in_memory(NearestOrbit)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
