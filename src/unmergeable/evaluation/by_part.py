"""Coefficients for parts of the defended expert: what a protection spoils in one part need not spoil the others.

    weights = base + c_p (victim - base) + r (rider - base)

with p the part that a tensor belongs to: attention or feed-forward, in the early or the late half of the network. A
point is (attention early, attention late, feed-forward early, feed-forward late, rider). The search begins at the best
point of whole experts and goes along one axis at a time, to whatever is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unmergeable.architecture import Architecture, FeedForward
from unmergeable.attacks.distance import parts

Point = tuple[float, ...]

BY_PART = "task_arithmetic, by part"
"""What the merge is called."""

PARTS = ("attention, early", "attention, late", "feed-forward, early", "feed-forward, late")

POINTS = 16
"""That are looked at besides the first."""

STEPS = (0.5, 0.25)
"""Shares of a coefficient that it is changed by; of one near nothing, of 1."""

LEAST = 0.2
"""Coefficients below are changed as 1 would be."""


@dataclass(frozen=True)
class ByPart:
    """Which part a tensor belongs to, by its name; the others follow the mean of all parts."""

    part_of: Mapping[str, int]

    @classmethod
    def of(cls, architecture: Architecture) -> ByPart:
        """From the blocks of an architecture, in the order of the network."""
        kinds: tuple[list[str], list[str]] = ([], [])
        for block in architecture.blocks:
            kinds[isinstance(block, FeedForward)].append(block.name)
        late = {
            name: 2 * kind + (2 * number >= len(names))
            for kind, names in enumerate(kinds)
            for number, name in enumerate(names)
        }
        found: dict[str, int] = {}
        for part in parts(architecture):
            for tensor in part.tensors:
                found.setdefault(tensor, late[part.block])
        return cls(found)

    def coefficients(self, name: str, point: Point) -> tuple[float, float]:
        """The defended expert's and the free-rider's in one tensor."""
        *own, rider = point
        part = self.part_of.get(name)
        return (sum(own) / len(own) if part is None else own[part]), rider


def spread(start: Point) -> Point:
    """The point of parts that is the point (defended expert, free-rider)."""
    defended, rider = start
    return (defended,) * len(PARTS) + (rider,)


def next_by_part(
    scores: Mapping[Point, tuple[float, float]], ranked: Sequence[Point], left: int, batch: int
) -> list[Point]:
    """Up to ``batch`` of the ``left`` points to look at next: neighbours of the best one, the far ones first.

    Args:
        scores: of what was looked at.
        ranked: the same points, best first.
        left: how many points may still be looked at.
        batch: the most at a time; the next ones then know what these scored.
    """
    best = ranked[0]
    proposed: dict[Point, None] = {}
    for step in STEPS:
        for axis, value in enumerate(best):
            size = step * (value if abs(value) >= LEAST else 1.0)
            for moved in (value + size, value - size):
                point = (*best[:axis], moved, *best[axis + 1 :])
                if point not in scores:
                    proposed[point] = None
    return list(proposed)[: min(left, batch)]
