"""What a protection is: an exact one draws gauges, changes of basis that the network cannot see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from torch import Tensor

from unmergeable.architecture import Architecture, Group, Space
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.gauge import Gauge
from unmergeable.progress import Progress
from unmergeable.randomness import Stream


@dataclass(frozen=True)
class Weights:
    """What a gauge may depend on besides the key's secret.

    ``source`` holds the expert's tensors when protecting and the protected ones when restoring, so that only what is
    the same in both may be read from it. ``orders`` are those the protection found once in the expert and the base, by
    space, int64 [size]; the key keeps them.
    """

    source: TensorSource
    orders: Mapping[str, Tensor] = field(default_factory=dict)


class GaugeProtection(Protocol):
    """An exact, keyed protection: a change of basis that the network cannot see."""

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]]

    @property
    def bound(self) -> float:
        """Bound on how much more than once a rounding error counts: the condition number of what mixes coordinates."""
        ...

    @property
    def stretch(self) -> float:
        """Bound on the condition number of its matrices, diagonals included. Alone a diagonal rounds each weight once;
        before or after something that mixes coordinates its condition counts as well."""
        ...

    def validate(self) -> None: ...

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases it changes. Raises BadInput where the architecture leaves it none."""
        ...

    def orders(
        self, architecture: Architecture, expert: TensorSource, base: TensorSource, progress: Progress
    ) -> dict[str, Tensor]:
        """Orders of spaces that depend on weights it changes, and so cannot be found again; empty for most."""
        ...

    def gauges(self, architecture: Architecture, stream: Stream, weights: Weights) -> tuple[Gauge, ...]:
        """What is applied, left to right; ``stream`` is the secret."""
        ...


def without_positions(spaces: Mapping[str, Space], kind: GroupKind) -> dict[str, Space]:
    """The spaces as papers have them that know no rotary positions: ``kind`` where a rotary group acts.

    Not a symmetry of the network: what is drawn there changes its function.
    """
    limit = "as published, which is not exact under rotary positions"
    return {
        name: replace(space, group=Group(kind), limit=limit) if space.group.kind == "rotary" else space
        for name, space in spaces.items()
    }
