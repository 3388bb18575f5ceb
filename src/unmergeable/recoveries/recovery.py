"""What a recovery is: it estimates, from a protected checkpoint and its base, the gauge that undoes the protection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from unmergeable.architecture import Architecture, Space
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.gauge import Gauge
from unmergeable.progress import Progress
from unmergeable.recoveries.distance import Distance, relative_distance


@dataclass(frozen=True)
class Fit:
    """How well one part of a block was brought back: its distance to the base as found and after the gauge.

    ``freedoms`` counts the numbers that were fitted.
    """

    before: Distance
    after: Distance
    freedoms: int

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
    """The gauge that brings a checkpoint nearest to its base, and what it achieves part by part.

    ``unmergeable.gauge.act.edits(architecture.symmetry, [gauge])`` applies it; the network stays the same function.
    """

    gauge: Gauge
    fits: tuple[Fit, ...]

    @property
    def before(self) -> float:
        """Relative distance to the base over all attention weights, as found."""
        return relative_distance(fit.before for fit in self.fits)

    @property
    def after(self) -> float:
        """Relative distance to the base over all attention weights, with the gauge applied."""
        return relative_distance(fit.after for fit in self.fits)

    @property
    def confidence(self) -> float:
        """From 0 to 1, over all parts together; see :func:`confidence`."""
        return confidence(self.fits)


class Recovery(Protocol):
    """Undoes an exact protection as far as its group reaches. ``exact``: the result is the same function."""

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]]

    def validate(self) -> None: ...

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases it can estimate in this network."""
        ...

    def estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress
    ) -> Estimate: ...
