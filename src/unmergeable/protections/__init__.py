"""Protections, one file each. A protection here is a dataclass that draws a gauge (see :class:`GaugeProtection`)."""

from __future__ import annotations

from typing import ClassVar, Protocol

from unmergeable.architecture import Architecture, Space
from unmergeable.gauge.gauge import Gauge
from unmergeable.protections.mergelock import MergeLock
from unmergeable.randomness import Stream


class GaugeProtection(Protocol):
    """An exact, keyed protection: a change of basis that the network cannot see."""

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]]

    @property
    def condition(self) -> float:
        """Bound on the condition number of what is applied."""
        ...

    def validate(self) -> None: ...

    def spaces(self, architecture: Architecture) -> dict[str, Space]: ...

    def gauge(self, architecture: Architecture, stream: Stream) -> Gauge: ...


PROTECTIONS: dict[str, type[GaugeProtection]] = {cls.name: cls for cls in (MergeLock,)}
