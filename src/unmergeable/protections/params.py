"""PaRaMS: hidden units in the order furthest from the base's, scaled attention (arXiv 2503.07661, ICCV 2025).

Feed-forward: per layer the permutation pi of hidden units with

    max_pi || theta_0 - pi(theta_d) ||^2  =  min_pi  sum_i < w_0i , w_d,pi(i) >

over all that belongs to a unit: its row of the gate and of the up projection (biases included), its column of the down
projection. A linear assignment problem, solved to a distance proven to be within :data:`NEAR` of the largest. The gate
of a gated feed-forward follows the permutation.

Attention: secret diagonals D, E with entries uniform in [smallest, largest] between queries and keys and between
values and output,

    Q' = D Q    K' = D^-1 K    V' = E V    O' = O E^-1

[0.05, 20] is what the public driver asks for, [0.5, 20] the default of its function. Under rotary positions one number
serves a frequency pair, behind a norm on queries and keys the gains are scaled. The public code draws from seed 0, so
that anybody can draw the same again; here entries come from the operating system. Scaling a row leaves the relative
error of rounding as it is; not so a gain stored as gain - 1 (Gemma 3), which therefore stays. ``as_published`` gives
every coordinate a number of its own under rotary positions too, which changes the function; its entries are secret all
the same.

``quantisation=kept`` keeps weights together that are quantised together (:mod:`unmergeable.gauge.grouped`). The order
is the furthest of those that do, found exactly; entries lie in [1/2, 2], and E has one for every group of a head's
values, since they scale columns. D scales rows, which have scales of their own in every format. It is what ``protect``
takes by itself: wide diagonals spread the numbers that share a scale.

The permutation depends on the expert's weights, which nobody has after the release but its owner: the key file keeps it
(4 bytes per hidden unit and layer).

What it does not stop: somebody who holds the base. The unit nearest to each of the base's is the same assignment
problem with the sign changed (``recover --method neuron_matching``), and a scale per coordinate is one division
(``recover --method diagonal_ratio``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Leg, Space
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.assignment import nearly_best_assignment
from unmergeable.gauge.elements import Element, Monomial, Rotary, pair_indices
from unmergeable.gauge.gauge import Gauge
from unmergeable.gauge.grouped import LIMIT, SIZES, cheapest_order, sizes_within
from unmergeable.progress import Progress
from unmergeable.protections.base import ProtectionRequirements
from unmergeable.protections.exact import ExactProtection, Quantisation, Weights, without_positions
from unmergeable.randomness import Stream
from unmergeable.settings import ADDED_LATER

ROWS = 2048
"""Rows of the cost matrix computed at a time: 112 MiB in float32 at 14 336 hidden units."""

NEAR = 1e-6
"""How far below the largest one a squared distance may be, relative to the squares of all hidden units of both
checkpoints together: what the squared distance would be if the units were orthogonal."""

_SCALED = ("general_linear", "rotary", "pair_scale", "diagonal")
"""Groups that hold scales of single coordinates or pairs; signs and quarter turns do not."""


NARROW = (0.5, 2.0)
"""Entries where quantisation is kept: groups that share a scale of scales, in formats of 4 bits, differ four times at
most, which takes two of that scale's six bits."""


@dataclass(frozen=True)
class PaRaMS(ExactProtection):
    """``smallest``, ``largest``: the range of the entries of the diagonals. The parts may be used alone.

    ``as_published``: a number for every coordinate under rotary positions too, where it is not exact.
    ``quantisation``: ``kept``, or ``free`` for the whole range and every order. ``part``: the only part of a network of
    several that is changed; empty for all.
    """

    name: ClassVar[str] = "params"
    summary: ClassVar[str] = "hidden units in the order furthest from the base's, attention scaled by secret diagonals"

    smallest: float = 0.05
    largest: float = 20.0
    attention: bool = True
    feed_forward: bool = True
    as_published: bool = False
    quantisation: Quantisation = field(default="free", metadata=ADDED_LATER)
    part: str = field(default="", metadata=ADDED_LATER)

    def validate(self) -> None:
        if not 1e-3 <= self.smallest <= self.largest <= 1e3 or math.isnan(self.smallest + self.largest):
            raise UsageError(
                f"params: smallest and largest must lie between 0.001 and 1000 and in this order, not {self.smallest} "
                f"and {self.largest}."
            )
        if not (self.attention or self.feed_forward):
            raise UsageError("params: attention and feed_forward are both off; leave one on.")
        self.require_free("as_published")

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements(exact=True, needs=("key", "base"), stage="basis")

    @property
    def bound(self) -> float:
        return 1.0

    @property
    def stretch(self) -> float:
        smallest, largest = self._range
        return largest / smallest if self.attention else 1.0

    @property
    def _range(self) -> tuple[float, float]:
        if not self.is_kept:
            return self.smallest, self.largest
        return max(self.smallest, min(NARROW[0], self.largest)), min(self.largest, max(NARROW[1], self.smallest))

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases it changes.

        Raises BadInput when the architecture has none of the parts that are on.
        """
        symmetry = architecture.symmetry
        attention = symmetry.select("query_key", "value_output") if self.attention else {}
        if self.as_published:
            attention = without_positions(attention, "diagonal")
        coarse = {leg.space for tensor in symmetry.gain_offset for leg in symmetry.legs[tensor]}
        found = {name: space for name, space in attention.items() if space.group.kind in _SCALED and name not in coarse}
        found |= self._reordered(architecture)
        if self.is_kept:
            found = {
                name: replace(space, limit=f"{space.limit}; {LIMIT}".removeprefix("; "))
                for name, space in found.items()
            }
        if not found:
            raise BadInput(f"params: a {architecture.family} model has none of the parts that are on.")
        return found

    def _reordered(self, architecture: Architecture) -> dict[str, Space]:
        if not self.feed_forward:
            return {}
        spaces = architecture.symmetry.select("feed_forward")
        return {name: space for name, space in spaces.items() if space.group.kind == "permutation"}

    def orders(
        self, architecture: Architecture, expert: TensorSource, base: TensorSource, progress: Progress
    ) -> dict[str, Tensor]:
        """The order of hidden units furthest from the base's, by space.

        Memory: one layer of both checkpoints, and four bytes for every pair of hidden units; twelve where the auction
        finds no proof and the exact solver takes over.

        Raises:
            BadInput: a feed-forward holds NaN or infinity.
        """
        spaces = self._reordered(architecture)
        legs: dict[str, dict[str, Leg]] = {name: {} for name in spaces}
        for tensor, every in architecture.symmetry.legs.items():
            for leg in every:
                if leg.space in legs:
                    legs[leg.space][tensor] = leg
        found: dict[str, Tensor] = {}
        for done, (name, space) in enumerate(spaces.items(), 1):
            cost, squares = _cost(expert, base, legs[name], space.size)
            if not (math.isfinite(squares) and bool(torch.isfinite(cost).all())):
                raise BadInput(
                    f"params: tensor {next(iter(legs[name]))} or one beside it holds NaN or infinity, in "
                    f"{expert.description} or {base.description}; get an undamaged copy, or set feed_forward=false."
                )
            # A squared distance holds inner products twice.
            if self.is_kept:
                found[name] = cheapest_order(cost, sizes_within(space.size))
            else:
                found[name] = furthest_order(cost, gap=NEAR * squares / 2)
            progress("assigning hidden units", done, len(spaces), "layers")
        return found

    def gauges(self, architecture: Architecture, stream: Stream, weights: Weights) -> tuple[Gauge, ...]:
        def element(name: str) -> Element:
            space = spaces[name]
            if space.role != "feed_forward":
                return self._scales(space, stream.child(name))
            ones = torch.ones(1, space.size, dtype=torch.float64)
            return Monomial(weights.orders[name][None], ones)

        spaces = self.spaces(architecture)
        return (Gauge(spaces, element),)

    def _scales(self, space: Space, stream: Stream) -> Element:
        """Entries uniform in [smallest, largest], one for a rotary pair where the group speaks of pairs."""
        smallest, largest = self._range
        width = largest - smallest
        pairing = space.group.pairing
        if pairing is None:
            alike = min(SIZES[-1], space.size & -space.size) if self.is_kept and space.role == "value_output" else 1
            drawn = smallest + width * torch.from_numpy(stream.uniform(space.blocks, space.size // alike))
            scale = drawn.repeat_interleave(alike, dim=1)
        else:
            values = smallest + width * torch.from_numpy(stream.uniform(space.blocks, space.size // 2))
            if space.group.kind == "rotary":
                return Rotary(values.to(torch.complex128), pairing)
            first, second = pair_indices(space.size, pairing)
            scale = torch.empty(space.blocks, space.size, dtype=torch.float64)
            scale[:, first] = scale[:, second] = values
        return Monomial(torch.arange(space.size).expand(space.blocks, -1), scale)


def furthest_order(cost: Tensor, *, gap: float) -> Tensor:
    """``index`` int64 [size] with a total ``cost[i, index[i]]`` at most ``gap`` above the least one.

    ``cost`` [size, size] is overwritten.
    """
    return nearly_best_assignment(cost.neg_(), gap=gap).columns


def _cost(expert: TensorSource, base: TensorSource, legs: Mapping[str, Leg], size: int) -> tuple[Tensor, float]:
    """Inner products of the base's hidden units (rows) with the expert's (columns), float32 [size, size]; the sum of
    the squares of both."""
    cost = torch.zeros(size, size)
    squares = 0.0
    for tensor, leg in legs.items():
        ours, theirs = (_units(source.tensor(tensor), leg, size) for source in (expert, base))
        columns = ours.float().T
        squares += float(torch.linalg.vector_norm(columns)) ** 2
        for start in range(0, size, ROWS):
            rows = theirs[start : start + ROWS].float()
            squares += float(torch.linalg.vector_norm(rows)) ** 2
            cost[start : start + ROWS].addmm_(rows, columns)
    return cost, squares


def _units(tensor: Tensor, leg: Leg, size: int) -> Tensor:
    """What one tensor holds of each hidden unit, [size, numbers]."""
    along = tensor.movedim(leg.axis, 0) if leg.slice is None else tensor[leg.slice].movedim(leg.axis - 1, 0)
    places = slice(leg.offset, leg.offset + size * leg.element_stride, leg.element_stride)
    return along[places].reshape(size, -1)
