"""The residual stream and the gains of its norms, brought back to the base's basis: before everything else.

Whatever a block's heads and units are compared by is written in the stream's basis, so that one is found first, from
the tensor that no other basis touches: the embedding E [tokens, hidden], with C = E0^T E,

    orthogonal            R = U V^T from C = U S V^T (Procrustes)
    centred orthogonal    the same across the vector of ones, which R takes to itself or to its negative
    signed permutation    the assignment that maximises sum_i |C_i,pi(i)|, and the signs of what it chose
    permutation, one sign the better of the assignments of C and of -C

A rotation acts only where all norm gains are one. So gains are moved into the weights that read their norm (a *fold*),
the stream is turned, and the base's own gains are moved out again. Gains may also have been moved by a protection, for
any diagonal matrix passes between a gain and its readers; they are first set to about the base's, g0 / g.

Tokens that a fine-tune took far away hardly count: :func:`_nearest_to_most`.

Both are estimates from few numbers. Once heads and units are known, :func:`refined` fits them to everything: the
rotation to every tensor along the stream, each gain to itself and the columns of its readers.

An embedding already near the base's says that nobody moved the stream, and then it stays: a fit would only follow
noise. The same holds for the gains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Leg, Space
from unmergeable.architecture.residual import Norm, Residual
from unmergeable.architecture.symmetry import ROTATIONS, GroupKind
from unmergeable.attacks.closed_forms import nearest_diagonal, nearest_orthogonal
from unmergeable.attacks.moments import CHUNK_ELEMENTS, LegPair, block_products, leg_pairs, legs_by_space
from unmergeable.attacks.reading import Reader
from unmergeable.gauge.assignment import best_assignment
from unmergeable.gauge.elements import Element, Monomial, Orthogonal
from unmergeable.gauge.gauge import Gauge, fixed_gauge
from unmergeable.gauge.groups import across_ones
from unmergeable.sums import squares

NEAR = 0.05
"""Relative distance of an embedding from the base's up to which nobody moved the stream."""

MOVED = 1.5
"""How many times nearer its base a rotated embedding must be for the stream to count as moved. A reordering, or a sign,
counts as soon as it is nearer: noise does not bring it about."""

FAR = 3.0
"""How many times further off than most a token is not believed."""

ROUNDING = 1e-6
"""Relative distance that storing a number may make."""

MAX_WEIGHTINGS = 10

ENOUGH = 4
"""Vectors for each coordinate that say whether a stream was moved."""

ADDED = 0.9
"""Share of a tensor's rows that both must have for the rest to count as added."""

GAINS_MOVED = 0.5
"""Relative distance of all gains from the base's beyond which they count as moved."""


@dataclass(frozen=True)
class Stream:
    """What was found: ``fold`` and ``turn`` bring the stream home, ``gains`` set the norms' gains. Empty: untouched."""

    fold: Gauge
    turn: Gauge
    gains: Gauge

    @property
    def gauges(self) -> tuple[Gauge, ...]:
        """In the order in which they act."""
        return tuple(gauge for gauge in (self.fold, self.turn, self.gains) if gauge.spaces)

    @property
    def is_refinable(self) -> bool:
        """Whether anything in it was estimated from less than all that speaks about it, and is no choice."""
        return bool(self.gains.spaces)


def find_stream(protected: Reader, base: Reader, architecture: Architecture, spaces: Mapping[str, Space]) -> Stream:
    """The bases of all streams among ``spaces``, from embeddings and gains."""
    turns: dict[str, Element] = {}
    folded: list[Norm] = []
    for residual in architecture.residuals:
        names = [f"{residual.name}.rotation"] if f"{residual.name}.rotation" in spaces else [residual.name]
        names.append(f"{residual.name}.centred_rotation")
        best: _Turn | None = None
        for space in (spaces[name] for name in names if name in spaces):
            turn = _turn_of_embedding(space, residual, protected, base)
            # A rotation follows noise, so that where an order does nearly as well it is the order.
            if turn is not None and (best is None or MOVED**2 * turn.after < best.after):
                best = turn
        if best is not None:
            turns[best.space.name] = best.element
            folded += [norm for norm in residual.norms if norm.space in best.space.folded]
    fold = fixed_gauge(spaces, {norm.space: _inverse_gain(norm, protected) for norm in folded})
    turned = fixed_gauge(spaces, turns)
    return Stream(fold, turned, _gains(fold, protected.under(fold, turned), base, architecture, spaces))


def refined(
    stream: Stream, rest: Sequence[Gauge], protected: Reader, base: Reader, architecture: Architecture
) -> Stream:
    """The same fitted to everything, given the gauges of all blocks, ``rest``."""
    legs = legs_by_space(architecture.symmetry)
    folded = (norm for residual in architecture.residuals for norm in residual.norms if norm.space in stream.fold)
    fold_of_base = fixed_gauge(stream.fold.spaces, {norm.space: _inverse_gain(norm, base) for norm in folded})
    turn = stream.turn
    rotations = {name: space for name, space in turn.spaces.items() if space.group.kind in ROTATIONS}
    if rotations:
        ours, theirs = protected.under(stream.fold, turn, *rest), base.under(fold_of_base)
        better = {
            name: Orthogonal(
                _NEAREST[space.group.kind](_products(space, legs[name], ours, theirs)).matrix() @ turn[name].matrix()
            )
            for name, space in rotations.items()
        }
        turn = fixed_gauge(turn.spaces, {**{name: turn[name] for name in turn}, **better})
    ours = protected.under(stream.fold, turn, *rest)
    gains = {name: _nearest_gain(space, legs[name], ours, base) for name, space in stream.gains.spaces.items()}
    return replace(stream, turn=turn, gains=fixed_gauge(stream.gains.spaces, gains))


@dataclass(frozen=True)
class _Turn:
    """An element of ``space``, and the squared distances from the base of what it acts on, before and after."""

    space: Space
    element: Element
    before: float
    after: float

    @property
    def is_moved(self) -> bool:
        """Whether it is much nearer by a rotation, or by an order at all."""
        if not isinstance(self.element, Monomial):
            return self.before > MOVED**2 * self.after
        is_identity = torch.equal(self.element.matrix()[0], torch.eye(self.space.size, dtype=torch.float64))
        return self.before > self.after and not is_identity


def _turn_of_embedding(space: Space, residual: Residual, protected: Reader, base: Reader) -> _Turn | None:
    """The nearest element, where it brings the embedding nearer: a rotation by :data:`MOVED`."""
    name = residual.axes[0].tensor
    both = _in_common(name, residual.axes[0].axis, protected, base)
    if both is None:
        return None
    ours, theirs = both
    if squares(ours - theirs) <= NEAR**2 * squares(theirs):
        return None
    (leg,) = (leg for leg in protected.symmetry.legs[name] if leg.space == space.name)
    offsets = protected.symmetry.gain_offset
    (pair,) = leg_pairs(space, [(name, leg)], {name: ours}, {name: theirs}, offsets)
    some = _some(pair, ENOUGH * space.size)
    # Most streams were not moved, which fewer vectors say as well.
    if some is not None and not _nearest_to_most(space, some).is_moved:
        return None
    turn = _nearest_to_most(space, pair)
    return turn if turn.is_moved else None


def _some(pair: LegPair, count: int) -> LegPair | None:
    """That many of the vectors of a table of tokens, from all of it; None where it has no more than twice as many."""
    outer, *_, inner = pair.protected.shape
    if inner > 1 or outer <= 2 * count:
        return None
    places = torch.linspace(0, outer - 1, count).long()
    return LegPair(pair.variance, pair.protected[places], pair.base[places])


def _nearest_to_most(space: Space, pair: LegPair) -> _Turn:
    """The nearest element to the vectors it brings near, by iterative reweighting (Holland and Welsch 1977).

    A fine-tune may take one token a long way, and least squares go with it. A vector further off than :data:`FAR` times
    the median distance counts by the inverse of its squared distance.
    """
    pieces = list(pair.parts(CHUNK_ELEMENTS))
    rounding = ROUNDING**2 * squares(pair.base) * space.size / pair.base.numel()
    before = [_squared_distances(piece.protected.double(), piece.base) for piece in pieces]
    weights = [torch.ones(()) for _ in pieces]
    turn: _Turn | None = None
    for _ in range(MAX_WEIGHTINGS):
        cross = torch.zeros(space.size, space.size, dtype=torch.float64)
        for piece, weight in zip(pieces, weights, strict=True):
            weighted = LegPair(piece.variance, piece.protected * weight, piece.base * weight)
            cross += block_products(space, [weighted], pair.variance)[0, :, 0]
        previous, element = turn, _NEAREST[space.group.kind](cross)
        moved = (element.apply(piece.protected.double(), pair.variance) for piece in pieces)
        after = [_squared_distances(vectors, piece.base) for vectors, piece in zip(moved, pieces, strict=True)]
        turn = _Turn(space, element, _total(before, weights), _total(after, weights))
        allowed = FAR**2 * max(float(torch.cat([part.flatten() for part in after]).median()), rounding)
        is_same = previous is not None and torch.equal(element.matrix(), previous.element.matrix())
        if is_same or all(bool((part <= allowed).all()) for part in after):
            break
        weights = [(allowed / part.clamp(min=allowed)).sqrt() for part in after]
    assert turn is not None
    return turn


def _squared_distances(vectors: Tensor, base: Tensor) -> Tensor:
    """Of every vector from the base's: float64 [outer, blocks, *spectators, 1, inner]."""
    return (vectors - base).square().sum(-2, keepdim=True)


def _total(squared: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """The sum of squares, each vector multiplied with its weight before."""
    return sum(float((part * weight.square()).sum()) for part, weight in zip(squared, weights, strict=True))


def _products(space: Space, legs: Sequence[tuple[str, Leg]], protected: Reader, base: Reader) -> Tensor:
    """``y x^T`` over the legs, base against protected, one tensor at a time: float64 [size, size]."""
    total = torch.zeros(space.size, space.size, dtype=torch.float64)
    for name, leg in legs:
        # A gain says nothing about a rotation, and little about an order; a bias divided by its norm's gain is as good
        # as infinite where that gain is near zero.
        is_divided = any(
            other.space in space.folded and other.variance == "vector" for other in protected.symmetry.legs[name]
        )
        says_nothing = leg.variance == "gain" or is_divided
        both = None if says_nothing else _in_common(name, leg.axis, protected, base)
        if both is not None:
            ours, theirs = ({name: side} for side in both)
            pairs = leg_pairs(space, [(name, leg)], ours, theirs, protected.symmetry.gain_offset)
            total += block_products(space, pairs, leg.variance)[0, :, 0]
    return total


def _rotation(cross: Tensor) -> Orthogonal:
    return Orthogonal(nearest_orthogonal(cross)[None])


def _centred_rotation(cross: Tensor) -> Orthogonal:
    """The nearest among those that take the vector of ones to itself or to its negative."""
    across = across_ones(len(cross))
    sign = -1.0 if float(cross.sum()) < 0 else 1.0
    return Orthogonal((sign / len(cross) + across @ nearest_orthogonal(across.mT @ cross @ across) @ across.mT)[None])


def _signed_permutation(cross: Tensor) -> Monomial:
    index = best_assignment(cross.abs())
    chosen = cross.gather(1, index[:, None])[:, 0]
    return Monomial(index[None], torch.where(chosen < 0, -1.0, 1.0).double()[None])


def _common_sign_permutation(cross: Tensor) -> Monomial:
    candidates = [(sign, best_assignment(sign * cross)) for sign in (1.0, -1.0)]
    sign, index = max(candidates, key=lambda pair: pair[0] * float(cross.gather(1, pair[1][:, None]).sum()))
    return Monomial(index[None], torch.full((1, len(index)), sign, dtype=torch.float64))


_NEAREST: dict[GroupKind, Callable[[Tensor], Element]] = {
    "orthogonal": _rotation,
    "centred_orthogonal": _centred_rotation,
    "signed_permutation": _signed_permutation,
    "common_sign_permutation": _common_sign_permutation,
}


def _gains(
    fold: Gauge, protected: Reader, base: Reader, architecture: Architecture, spaces: Mapping[str, Space]
) -> Gauge:
    """g0 / g for every norm whose gain was folded, and for the others where they are far from the base's."""
    norms = [norm for residual in architecture.residuals for norm in residual.norms if norm.space in spaces]
    pairs = {norm.space: (_gain(norm, protected), _gain(norm, base)) for norm in norms}
    others = [pair for name, pair in pairs.items() if name not in fold]
    away = sum(float((ours - theirs).square().sum()) for ours, theirs in others)
    is_moved = away > GAINS_MOVED**2 * sum(float(theirs.square().sum()) for _, theirs in others)
    ratios = {name: theirs / ours for name, (ours, theirs) in pairs.items() if is_moved or name in fold}
    scales = {name: ratio if name in fold else _without_outliers(ratio) for name, ratio in ratios.items()}
    return fixed_gauge(spaces, {name: _diagonal(scale) for name, scale in scales.items()})


def _without_outliers(ratio: Tensor) -> Tensor:
    """Magnitudes kept within the middle 90 %: a fine-tune changes gains near zero by any factor."""
    magnitude = ratio.abs()
    lowest, highest = torch.quantile(magnitude, torch.tensor([0.05, 0.95], dtype=torch.float64))
    return magnitude.clamp(lowest, highest).copysign(ratio)


def _gain(norm: Norm, reader: Reader) -> Tensor:
    """As the network multiplies with it, float64; 1 in place of zeros, which no gauge moves."""
    gain = reader([norm.gain])[norm.gain].double() + norm.offset
    return torch.where(gain == 0, 1.0, gain)


def _inverse_gain(norm: Norm, reader: Reader) -> Monomial:
    return _diagonal(1 / _gain(norm, reader))


def _diagonal(scale: Tensor) -> Monomial:
    return Monomial(torch.arange(len(scale))[None], scale[None])


def _nearest_gain(space: Space, legs: Sequence[tuple[str, Leg]], protected: Reader, base: Reader) -> Monomial:
    found = {name: _in_common(name, leg.axis, protected, base) for name, leg in legs}
    both = {name: sides for name, sides in found.items() if sides is not None}
    legs = [(name, leg) for name, leg in legs if name in both]
    ours, theirs = ({name: sides[side] for name, sides in both.items()} for side in (0, 1))
    return nearest_diagonal(space, leg_pairs(space, legs, ours, theirs, protected.symmetry.gain_offset))


def _in_common(name: str, axis: int, protected: Reader, base: Reader) -> tuple[Tensor, Tensor] | None:
    """A tensor of both, with the rows in common where a few were added (tokens of a vocabulary); ``axis`` is whole.

    None where the base has no such tensor: heads of a fine-tune may be others than the base's.
    """
    if name not in base.source.index.entries:
        return None
    shapes = [reader.source.spec(name).shape for reader in (protected, base)]
    if len(shapes[0]) != len(shapes[1]) or shapes[0][axis] != shapes[1][axis]:
        return None
    common = [min(lengths) for lengths in zip(*shapes, strict=True)]
    if any(length < ADDED * max(lengths) for length, lengths in zip(common, zip(*shapes, strict=True), strict=True)):
        return None
    ours, theirs = (
        reader.read(name)[tuple(slice(length) for length in common)].contiguous() for reader in (protected, base)
    )
    return ours, theirs
