"""What a recovery is: from a protected checkpoint, its base and perhaps more, a checkpoint that merges again.

Most estimate gauges and keep the function (:class:`Estimate`); some change weights (:class:`Recovered` without one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.attacks.distance import Distance, relative_distance
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.gauge import Gauge
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class Fit:
    """How well one part of a block was brought back: its distance to the base as found and after the gauges.

    ``freedoms`` counts the numbers that were fitted. ``margin`` says how clear the order of its heads or hidden units
    was (:class:`~unmergeable.attacks.orders.Match`), None where no order was looked for.
    """

    before: Distance
    after: Distance
    freedoms: int
    margin: float | None = None

    @property
    def confidence(self) -> float:
        """See :func:`confidence`."""
        return confidence([self])


def confidence(fits: tuple[Fit, ...] | list[Fit]) -> float:
    """How sure it is that the base belongs to the checkpoint and its basis was found, from 0 to 1.

    The share of the base's squared norm that the recovered checkpoint explains, adjusted for the numbers fitted (the
    adjusted R^2 of a regression): 0 for what fitting an unrelated base gives, 1 for the base itself.
    """
    numel, freedoms = sum(fit.after.numel for fit in fits), sum(fit.freedoms for fit in fits)
    if freedoms >= numel:
        return 0.0
    unexplained = relative_distance(fit.after for fit in fits) ** 2 * numel / (numel - freedoms)
    return max(0.0, 1.0 - unexplained)


@dataclass(frozen=True)
class Estimate:
    """The gauges that bring a checkpoint nearest to its base, and what they achieve part by part.

    ``unmergeable.gauge.plan.transformed`` applies them, left to right: the residual stream, experts, heads and hidden
    units in order, the bases inside them. The network stays the same function.

    ``template``: what they apply to, where that is not the checkpoint itself: biases, gains and scales had been traded
    between tensors too (:mod:`unmergeable.attacks.canonicalise`), which no gauge undoes; ``traces`` says which.
    """

    gauges: tuple[Gauge, ...]
    fits: tuple[Fit, ...]
    template: TensorSource | None = None
    traces: tuple[str, ...] = ()

    def condition(self) -> float:
        """A bound on the condition number of what is applied: the product over the gauges."""
        return math.prod(gauge.condition() for gauge in self.gauges)

    @property
    def before(self) -> float:
        """Relative distance to the base over all parts that were fitted, as found."""
        return relative_distance(fit.before for fit in self.fits)

    @property
    def after(self) -> float:
        """Relative distance to the base over all parts that were fitted, with the gauges applied."""
        return relative_distance(fit.after for fit in self.fits)

    @property
    def confidence(self) -> float:
        """From 0 to 1, over all parts together; see :func:`confidence`."""
        return confidence(self.fits)


Finding = float | int | str

NOT_RECOGNISED = "not recognised: the base explains nothing of these weights in any basis that was tried"


@dataclass(frozen=True)
class Inputs:
    """What a recovery may look at: ``sources`` are public fine-tunes of the base.

    The base comes under the tensor names of the protected checkpoint. ``architecture`` is that of the result.
    """

    protected: TensorSource
    base: TensorSource
    architecture: Architecture
    sources: tuple[TensorSource, ...] = ()


@dataclass(frozen=True)
class Recovered:
    """A checkpoint with the layout of ``template``, some of its tensors changed.

    Either by the gauges of ``estimate``, or one by one by ``edits`` (each may work in place). ``findings``: what was
    found out on the way, by name.
    """

    template: TensorSource
    edits: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    findings: Mapping[str, Finding] = field(default_factory=dict)
    estimate: Estimate | None = None


class Attack(Protocol):
    """One attack. ``exact``: the result computes what the protected checkpoint computes.

    ``needs`` names what it reads besides the protected checkpoint: "base", "sources", "data". Those that need data are
    settings; live networks carry them out.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]]

    def validate(self) -> None: ...


class WeightAttack(Attack, Protocol):
    """A recovery that looks at weights alone."""

    def recover(self, inputs: Inputs, progress: Progress) -> Recovered:
        """Find out what to change; writes nothing."""
        ...


class GaugeAttack(Protocol):
    """A recovery that estimates gauges, and keeps the function."""

    def estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
    ) -> Estimate:
        """The gauges that bring ``protected`` nearest to ``base``, and the distances they leave."""
        ...

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """See :meth:`estimate`."""
        estimate = self.estimate(inputs.protected, inputs.base, inputs.architecture, progress)
        return recovered_by(estimate, inputs.protected)


def recovered_by(estimate: Estimate, protected: TensorSource) -> Recovered:
    """What an estimate makes of the checkpoint. One that explains nothing says so."""
    findings: dict[str, Finding] = {} if estimate.confidence > 0 else {"result": NOT_RECOGNISED}
    return Recovered(estimate.template or protected, findings=findings, estimate=estimate)
