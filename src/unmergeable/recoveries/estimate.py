"""The loop of every recovery: one part of one block in memory, the nearest element of each of its spaces in turn.

Spaces that act on the same numbers (signs, turns and gains around a norm on queries and keys) are estimated one after
another, each on what the others leave, until the distance to the base stops falling. All others need one look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Leg, Space
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Element, compose
from unmergeable.gauge.gauge import Gauge, fixed_gauge
from unmergeable.gauge.groups import identity
from unmergeable.progress import Progress
from unmergeable.recoveries.distance import Part, part_distance, parts, require_comparable
from unmergeable.recoveries.moments import LegPair, leg_pairs, legs_by_space
from unmergeable.recoveries.recovery import Estimate, Fit

Nearest = Callable[[Space, Sequence[LegPair]], Element]
"""Finds the element of a space's group that brings the protected side of its legs nearest to the base's."""

MAX_ROUNDS = 20
RELATIVE_PROGRESS = 1e-9

# Discrete choices first: a factor fitted to a row of the wrong sign or to the wrong row means nothing.
_ORDER: tuple[GroupKind, ...] = ("quarter_turn", "pair_sign", "block_sign")


def estimate_gauge(
    protected: TensorSource,
    base: TensorSource,
    architecture: Architecture,
    nearest: Mapping[GroupKind, Nearest],
    spaces: Mapping[str, Space],
    progress: Progress,
) -> Estimate:
    """The gauge over ``spaces`` made of the ``nearest`` element of each, and its effect on every attention part.

    Raises:
        Mismatch: when the checkpoints do not hold the same attention tensors.
        BadInput: when one of them holds NaN or infinity.
    """
    selected = [part for part in parts(architecture) if part.name != "feed_forward"]
    require_comparable(protected, base, selected)
    solver = _Solver(architecture, nearest, spaces)
    elements: dict[str, Element] = {}
    fits: list[Fit] = []
    for part in selected:
        found, fit = solver.solve(part, _read(protected, part), _read(base, part))
        elements |= found
        fits.append(fit)
        progress("estimating", len(fits), len(selected), "parts")
    return Estimate(fixed_gauge(architecture.symmetry.spaces, elements), tuple(fits))


class _Solver:
    """Estimates the spaces of one part after another; holds only tables."""

    def __init__(
        self, architecture: Architecture, nearest: Mapping[GroupKind, Nearest], spaces: Mapping[str, Space]
    ) -> None:
        self._symmetry = architecture.symmetry
        self._nearest = nearest
        self._spaces = spaces
        self._legs = legs_by_space(self._symmetry)

    def solve(
        self, part: Part, protected: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> tuple[dict[str, Element], Fit]:
        """The elements of the part's spaces, from its tensors in float64."""
        own = self._spaces_of(part)
        elements: dict[str, Element] = {}
        for component in self._components(own):
            elements |= self._solve_component(component, part, protected, base)
        before = part_distance(part, protected.__getitem__, base.__getitem__)
        after = part_distance(part, self._moved(protected, elements).__getitem__, base.__getitem__)
        return elements, Fit(before, after, sum(freedoms(space) for space in own))

    def _spaces_of(self, part: Part) -> list[Space]:
        tensors = set(part.tensors)
        return [
            space
            for name, space in self._spaces.items()
            if space.role == part.name and any(tensor in tensors for tensor, _ in self._legs[name])
        ]

    def _components(self, spaces: list[Space]) -> list[list[Space]]:
        """Groups of spaces that act on a common number, each in the order of estimation."""
        components: list[list[Space]] = []
        for space in spaces:
            touching = [other for other in components if any(self._overlap(space, member) for member in other)]
            components = [other for other in components if other not in touching]
            components.append([*(member for other in touching for member in other), space])
        rank = {kind: place for place, kind in enumerate(_ORDER)}
        return [sorted(group, key=lambda space: rank.get(space.group.kind, len(rank))) for group in components]

    def _overlap(self, first: Space, second: Space) -> bool:
        return any(
            tensor == other and (leg.axis != other_leg.axis or _meet(_extent(leg, first), _extent(other_leg, second)))
            for tensor, leg in self._legs[first.name]
            for other, other_leg in self._legs[second.name]
        )

    def _solve_component(
        self, component: list[Space], part: Part, protected: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Element]:
        if len(component) == 1:
            return {space.name: self._nearest_to_base(space, protected, base) for space in component}
        elements = {space.name: identity(space) for space in component}
        lowest = part_distance(part, protected.__getitem__, base.__getitem__).difference
        for _ in range(MAX_ROUNDS):
            previous = dict(elements)
            for space in component:
                element = self._nearest_to_base(space, self._moved(protected, elements), base)
                # The groups of one component commute, so that a correction multiplies onto the earlier element.
                elements[space.name] = compose(element, elements[space.name])
            reached = part_distance(part, self._moved(protected, elements).__getitem__, base.__getitem__).difference
            if reached >= lowest * (1 - RELATIVE_PROGRESS):
                return previous
            lowest = reached
        return elements

    def _nearest_to_base(self, space: Space, protected: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Element:
        legs = leg_pairs(space, self._legs[space.name], protected, base, self._symmetry.gain_offset)
        return self._nearest[space.group.kind](space, legs)

    def _moved(self, tensors: Mapping[str, Tensor], elements: Mapping[str, Element]) -> Mapping[str, Tensor]:
        gauge: Gauge = fixed_gauge(self._spaces, elements)
        return transform_all(tensors, self._symmetry, [gauge]) if elements else tensors


def freedoms(space: Space) -> int:
    """Real numbers that are free in an element of a space's group; a discrete choice counts as one.

    For a recovery that searches a smaller group, an upper bound.
    """
    per_block: dict[GroupKind, int] = {
        "general_linear": space.size**2,
        "rotary": space.size,
        "quarter_turn": space.size // 2,
        "pair_sign": space.size // 2,
        "pair_scale": space.size // 2,
        "block_scale": 1,
        "block_sign": 1,
    }
    return space.blocks * per_block.get(space.group.kind, space.size)


def _read(source: TensorSource, part: Part) -> dict[str, Tensor]:
    tensors = {}
    for name in part.tensors:
        tensors[name] = source.tensor(name).to(torch.float64)
        if not bool(tensors[name].sum().isfinite()):  # a sum in float64 overflows for no finite weights
            raise BadInput(f"tensor {name} of {source.description} holds NaN or infinity; download it again.")
    return tensors


def _extent(leg: Leg, space: Space) -> Tensor:
    """Positions of the leg's coordinates on its axis."""
    positions = torch.tensor([leg.offset])
    for count, stride in ((space.blocks, leg.block_stride), (space.size, leg.element_stride), *leg.spectators):
        positions = (positions[:, None] + torch.arange(count) * stride).flatten()
    return positions


def _meet(first: Tensor, second: Tensor) -> bool:
    return bool(torch.isin(first, second).any())
