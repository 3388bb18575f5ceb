"""What an attack is: from a protected checkpoint, its base and perhaps more, a checkpoint that merges again.

An attack is one file: a frozen dataclass of settings with the four members of :class:`Attack`. Most estimate gauges and
keep the function (:class:`~unmergeable.attacks.estimate.GaugeAttack`); some edit weights one by one, some train on the
attacker's examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.attacks.distance import Distance, relative_distance
from unmergeable.attacks.examples import Examples
from unmergeable.checkpoint.plan import OutputTensor, output_like
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.gauge.gauge import Gauge
from unmergeable.gauge.plan import transformed
from unmergeable.progress import Progress, silent
from unmergeable.registry import Requirements


@dataclass(frozen=True)
class Fit:
    """How near one part of a block was brought to the base: its distance as stored, and with the gauges applied.

    ``freedoms`` counts the numbers that were fitted. ``margin`` says how clear the permutation of its heads or hidden
    units was (:class:`~unmergeable.attacks.matching.Match`), None where none was looked for.
    """

    before: Distance
    after: Distance
    freedoms: int
    margin: float | None = None

    @property
    def confidence(self) -> float:
        """See :func:`confidence`."""
        return confidence([self])

    def to_json(self) -> dict[str, Any]:
        return {
            "block": self.before.block,
            "part": self.before.part,
            "before": self.before.relative,
            "after": self.after.relative,
            "confidence": self.confidence,
            "order_margin": self.margin,
        }


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

    ``unmergeable.gauge.plan.transformed`` applies them, left to right: the residual stream, the permutations of
    experts, heads and hidden units, the bases inside them. The network stays the same function.

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
        """Relative distance to the base over all parts that were fitted, as stored."""
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
Structure = Literal["base", "polynomial", "any"]
Whose = Literal["defended", "own"]
Access = Literal["weights", "answers"]


@dataclass(frozen=True)
class AttackRequirements(Requirements):
    """``structure`` of the checkpoints that the attack works on.

    "base": the base's own, in a family with a symmetry map. "polynomial": also one whose feed-forwards were replaced by
    polynomials. "any": whatever the protection made of it. Of the inputs, only the base need then have a symmetry map.

    ``examples``: whose it reads, where it reads data. "defended": those of the task that the release was tuned for,
    which few attackers have. "own": any that the network takes, as those of the attacker's own task; all have some.

    ``access`` to the release. "answers": it is run and never looked into.
    """

    structure: Structure = "base"
    examples: Whose = "defended"
    access: Access = "weights"


@dataclass(frozen=True)
class Inputs:
    """What an attack may look at.

    Attributes:
        protected: the release; for some attacks a merge that contains it.
        base: what it was fine-tuned from, under the tensor names of the protected checkpoint.
        architecture: of the result.
        sources: other checkpoints the attacker holds, such as public fine-tunes of the base.
        data: the attacker's examples, for attacks that need data.
    """

    protected: TensorSource
    base: TensorSource
    architecture: Architecture
    sources: tuple[TensorSource, ...] = ()
    data: Examples | None = None

    def require_data(self, method: str) -> Examples:
        """The examples; raises UsageError, in the name of the method that needs them, when there are none."""
        if self.data is None:
            raise UsageError(f"{method} learns from examples: give them with --data.")
        return self.data


class Learnt(Protocol):
    """What an attack found out from data besides the weights."""

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON. It also tells one run from another: the output of a different one is never resumed."""
        ...

    def lines(self) -> list[str]:
        """The same for a terminal."""
        ...


@dataclass(frozen=True)
class Recovered:
    """A checkpoint with the layout of ``template``, some of its tensors changed.

    Either by the gauges of ``estimate``, or one by one by ``edits`` (each may work in place). ``findings``: numbers the
    attack found in the weights, by name. ``learnt``: what it found out from data. ``config_changes``: what has to be
    said differently in the ``config.json`` of the template's folder, None where that is to stay byte for byte.
    """

    template: TensorSource
    edits: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    findings: Mapping[str, Finding] = field(default_factory=dict)
    estimate: Estimate | None = None
    learnt: Learnt | None = None
    config_changes: Mapping[str, Any] | None = None

    def plan(self, architecture: Architecture) -> tuple[OutputTensor, ...]:
        """What to write; ``architecture`` as in :class:`Inputs`."""
        if self.estimate is None:
            return output_like(self.template, self.edits)
        return transformed(self.template, architecture.symmetry, self.estimate.gauges)


class Attack(Protocol):
    """One attack: a frozen dataclass whose fields, all with defaults, are its settings."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def validate(self) -> None:
        """Raises UsageError for settings that make no sense."""
        ...

    def requirements(self) -> AttackRequirements:
        """What it needs with these settings ("base", "sources", "data"), and whether the function stays the same."""
        ...

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Find out what to change; writes nothing."""
        ...


def recovered_by(estimate: Estimate, protected: TensorSource) -> Recovered:
    """What an estimate makes of the checkpoint. One that explains nothing says so."""
    findings: dict[str, Finding] = {} if estimate.confidence > 0 else {"result": NOT_RECOGNISED}
    return Recovered(estimate.template or protected, findings=findings, estimate=estimate)
