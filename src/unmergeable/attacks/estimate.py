"""The loop of every attack that stays on the orbit: outermost first, one block in memory at a time.

The residual stream, then the permutations of experts, heads and hidden units, then the bases inside them: each is
compared by what the later ones do not alter, and can only be compared once the earlier ones are undone. What was
estimated of the stream from few numbers is fitted again to all of them, until the distance to the base stops falling.

Spaces that act on the same numbers (signs, turns and gains around a norm on queries and keys) are estimated one after
another, each on what the others leave, until the distance to the base stops falling. All others need one look.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Leg, Space
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.attacks.base import AttackRequirements, Estimate, Fit, Inputs, Recovered, recovered_by
from unmergeable.attacks.distance import Part, part_distance, parts, require_comparable
from unmergeable.attacks.hidden_units import UnitSimilarity, unit_similarity
from unmergeable.attacks.matching import Match
from unmergeable.attacks.moments import LegPair, leg_pairs, legs_by_space
from unmergeable.attacks.permutations import match_experts, match_permutations
from unmergeable.attacks.reading import Reader
from unmergeable.attacks.residual_stream import Stream, find_stream, refined
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.act import act_
from unmergeable.gauge.elements import Element, compose
from unmergeable.gauge.gauge import Gauge, fixed_gauge
from unmergeable.gauge.groups import identity
from unmergeable.progress import Progress, silent

Nearest = Callable[[Space, Sequence[LegPair]], Element]
"""Finds the element of a space's group that brings the protected side of its legs nearest to the base's."""

MAX_ROUNDS = 20
RELATIVE_PROGRESS = 1e-9

MAX_STREAM_ROUNDS = 5
RELATIVE_STREAM_PROGRESS = 1e-3
"""Each round reads the whole checkpoint; a tenth of a percent is not worth one."""

# Discrete choices first: a factor fitted to a row of the wrong sign or to the wrong row means nothing.
_ORDER: tuple[GroupKind, ...] = ("quarter_turn", "pair_sign", "block_sign")


@dataclass(frozen=True)
class Solvers:
    """What an attack looks for: the ``nearest`` element of each kind of group, and how it recognises hidden units."""

    nearest: Mapping[GroupKind, Nearest] = field(default_factory=dict)
    unit_similarity: UnitSimilarity = unit_similarity


class GaugeAttack(ABC):
    """An attack that estimates gauges, and keeps the function: says over which spaces, and with which solvers."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def spaces(self, architecture: Architecture) -> Mapping[str, Space]:
        """The bases and permutations to estimate, by name."""

    @property
    @abstractmethod
    def solvers(self) -> Solvers:
        """How to estimate them."""

    def validate(self) -> None:  # noqa: B027 - most have nothing to refuse
        """Raises UsageError for settings that make no sense."""

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(exact=True, needs=("base",))

    def estimate(
        self, protected: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
    ) -> Estimate:
        """The gauges that bring ``protected`` nearest to ``base``, and the distances they leave.

        Raises:
            Mismatch: the checkpoints do not hold the same tensors in the parts of blocks that it estimates.
            BadInput: one of them holds NaN or infinity.
        """
        return estimate_gauges(protected, base, architecture, self.solvers, self.spaces(architecture), progress)

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """See :meth:`estimate`."""
        estimate = self.estimate(inputs.protected, inputs.base, inputs.architecture, progress)
        return recovered_by(estimate, inputs.protected)


def estimate_gauges(
    protected: TensorSource,
    base: TensorSource,
    architecture: Architecture,
    solvers: Solvers,
    spaces: Mapping[str, Space],
    progress: Progress,
    stream: Stream | None = None,
) -> Estimate:
    """The gauges over ``spaces``, and their effect on every part of a block that has one of them.

    Args:
        protected: the release.
        base: what it was fine-tuned from.
        architecture: of both.
        solvers: how elements are found.
        spaces: what is looked for.
        progress: told of the parts done.
        stream: what :func:`find_stream` says of these, where somebody has asked before.

    Raises:
        Mismatch: when the checkpoints do not hold the same tensors in these parts.
        BadInput: when one of them holds NaN or infinity.
    """
    roles = {space.role for space in spaces.values()}
    selected = [part for part in parts(architecture) if part.name in roles]
    require_comparable(protected, base, selected)
    ours, theirs = (Reader(source, architecture.symmetry) for source in (protected, base))
    stream = stream or find_stream(ours, theirs, architecture, spaces)
    experts = match_experts(ours.under(*stream.gauges), theirs, architecture, spaces, progress)
    solver = _Solver(architecture, solvers.nearest, spaces)

    def blocks_under(stream: Stream) -> tuple[tuple[Gauge, ...], Estimate]:
        """The gauges inside all blocks once ``stream`` is applied, and with it the whole estimate."""
        placed = ours.under(*stream.gauges, _permutations(spaces, experts))
        matches = match_permutations(placed, theirs, architecture, spaces, solvers.unit_similarity, progress)
        ordered = placed.under(_permutations(spaces, matches))
        elements: dict[str, Element] = {}
        fits: list[Fit] = []
        for part in selected:
            own, fit = solver.solve(part, ours, ordered, theirs)
            elements |= own
            fits.append(replace(fit, margin=_margin(part, experts | matches, architecture)))
            progress("estimating", len(fits), len(selected), "parts")
        rest = (_permutations(spaces, experts), _permutations(spaces, matches), fixed_gauge(spaces, elements))
        return rest, Estimate(tuple(gauge for gauge in (*stream.gauges, *rest) if gauge.spaces), tuple(fits))

    rest, estimate = blocks_under(stream)
    for _ in range(MAX_STREAM_ROUNDS if stream.is_refinable else 0):
        stream = refined(stream, rest, ours, theirs, architecture)
        rest, better = blocks_under(stream)
        previous, estimate = estimate, better
        # A last norm read by the output head alone changes no block: as near as before is still an answer.
        if better.after >= previous.after * (1 - RELATIVE_STREAM_PROGRESS):
            break
    return estimate


def _permutations(spaces: Mapping[str, Space], matches: Mapping[str, Match]) -> Gauge:
    return fixed_gauge(spaces, {name: match.permutation for name, match in matches.items()})


def _margin(part: Part, matches: Mapping[str, Match], architecture: Architecture) -> float | None:
    """Of the least clear permutation that moves the part's tensors or what is in them."""
    symmetry = architecture.symmetry
    stacks = [symmetry.stack_of[name] for name in part.tensors if name in symmetry.stack_of]
    legs = [leg for name in part.tensors for leg in symmetry.legs.get(name, ())]
    spaces = {leg.space for leg in [*legs, *(leg for stack in stacks for leg in stack.legs)]}
    return min((match.margin for name, match in matches.items() if name in spaces), default=None)


class _Solver:
    """Estimates the spaces of one part after another; holds only tables."""

    def __init__(
        self, architecture: Architecture, nearest: Mapping[GroupKind, Nearest], spaces: Mapping[str, Space]
    ) -> None:
        self._symmetry = architecture.symmetry
        self._nearest = nearest
        self._spaces = spaces
        self._legs = legs_by_space(self._symmetry)

    def solve(self, part: Part, stored: Reader, ordered: Reader, base: Reader) -> tuple[dict[str, Element], Fit]:
        """The elements of the part's bases, and the distances to the base as ``stored`` and at the end."""
        theirs = base(part.tensors)
        before = part_distance(part, stored(part.tensors).__getitem__, theirs.__getitem__)
        ours = ordered(part.tensors)
        own = self._spaces_of(part)
        elements: dict[str, Element] = {}
        for component in self._components([space for space in own if space.group.kind != "permutation"]):
            elements |= self._solve_component(component, part, ours, theirs)
        after = part_distance(part, self._moved(ours, elements).__getitem__, theirs.__getitem__)
        return elements, Fit(before, after, sum(freedoms(space) for space in own))

    def _spaces_of(self, part: Part) -> list[Space]:
        names = dict.fromkeys(
            leg.space
            for tensor in part.tensors
            for leg in self._symmetry.legs.get(tensor, ())
            if leg.slice is None or part.holds(tensor, leg.slice)
        )
        return [self._spaces[name] for name in names if name in self._spaces and self._spaces[name].role == part.name]

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
            tensor == other
            and (leg.slice == other_leg.slice or leg.slice is None or other_leg.slice is None)
            and (leg.axis != other_leg.axis or _meet(_extent(leg, first), _extent(other_leg, second)))
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
        gauge = fixed_gauge(self._spaces, elements)
        touched = [name for name in tensors if any(leg.space in gauge for leg in self._symmetry.legs.get(name, ()))]
        return {**tensors, **{name: act_(tensors[name].clone(), name, self._symmetry, [gauge]) for name in touched}}


def freedoms(space: Space) -> int:
    """Real numbers that are free in an element of a space's group; a discrete choice counts as one.

    For an attack that searches a smaller group, an upper bound.
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


def _extent(leg: Leg, space: Space) -> Tensor:
    """Positions of the leg's coordinates on its axis."""
    positions = torch.tensor([leg.offset])
    for count, stride in ((space.blocks, leg.block_stride), (space.size, leg.element_stride), *leg.spectators):
        positions = (positions[:, None] + torch.arange(count) * stride).flatten()
    return positions


def _meet(first: Tensor, second: Tensor) -> bool:
    return bool(torch.isin(first, second).any())
