"""canonicalise: constants, gains and scales that were moved between tensors, back to where the base has them.

A change of basis is not all that keeps a function: biases trade with biases, gains and layer scales with the weights
beside them, and a LayerNorm is blind in one direction (:mod:`unmergeable.gauge.additive` lists every case). Whoever
moves them at random takes a checkpoint as far from its base as he likes, and no search over bases brings it back.
With the base at hand they are undone in closed form, one tensor at a time:

    balance     factors far apart in scale, such as queries and keys, times powers of two
    neutral     everything undone in the checkpoint: biases moved on, gains and scales 1, unseen directions 0
    home        g, l    the scales a that minimise  |W / a - W0|^2, a number for each coordinate
                b, b_v, b_k     the base's, taken out of the reader's or the output's bias
                u       the multiple of the unseen direction that brings W nearest to W0

The result computes the same function. A checkpoint that shows no trace of such a trade stays as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Leg, Space
from unmergeable.architecture.residual import Rows
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.closed_forms import over_pairs
from unmergeable.attacks.in_memory import in_memory
from unmergeable.attacks.moments import diagonal_moments, leg_pairs, legs_by_space
from unmergeable.attacks.reading import GaugedSource, Reader
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.additive import Freedoms, Neutral, along, copies_of, freedoms_of
from unmergeable.gauge.elements import Element, Monomial, pair_indices
from unmergeable.gauge.gauge import Gauge, fixed_gauge
from unmergeable.gauge.home import AsStored, Home
from unmergeable.progress import Progress, silent
from unmergeable.sums import pieces, squares, squares_along

SCALABLE: frozenset[GroupKind] = frozenset({"general_linear", "rotary", "diagonal", "positive_diagonal"})
"""Groups that hold every positive scale of a coordinate, or of a frequency pair."""

MOVED = 0.5
"""Relative distance of norm biases, layer scales or output biases from the base's beyond which they count as moved."""

LARGER = 1.3
"""How many times its share of the base's weights an unseen part may take up. A fine-tune and a change of basis with
moderate condition leave the share, which is an average over thousands of rows, nearly as it is."""

FLOOR = 1e-4
"""Share of the weights' squares below which an unseen part is too small to matter."""

SUMMED = "summed rows"
POSITION_BIAS = "position bias"

TRADED = 0.25
"""A scale was traded when its product with the norms of the weights beside it moved by less than this share (of the
mean square of logarithms): what a fine-tune changes, it changes by itself."""

EXTREME = 16.0
"""Powers of two between the scales of two factors, beyond the base's, that no fit should have to find. The protections
here stay below at their defaults."""

SEEN = 0.01
"""Root mean square of logarithms of a scale below which a trade is not worth looking for."""

SEEN_ALIKE = 0.1
"""The same for scales that all moved by one factor."""


@dataclass(frozen=True)
class Canonicalise:
    """No settings."""

    name: ClassVar[str] = "canonicalise"
    summary: ClassVar[str] = "biases, gains and scales that were traded between tensors, as the base has them"

    def validate(self) -> None:
        """There is nothing to set."""

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(exact=True, needs=("base",))

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Undoes every trade as soon as there are traces of one, and nothing else."""
        freedoms = freedoms_of(inputs.architecture, inputs.protected.names)
        source, scales = balanced(inputs.protected, inputs.base, inputs.architecture)
        found = (["extreme scales"] if scales.spaces else []) + list(traces(source, inputs.base, freedoms))
        if not found:
            return Recovered(inputs.protected, findings={"traces": "none"})
        home = Home(inputs.protected, freedoms, inputs.base, Neutral(source, freedoms).tensor)
        return Recovered(AsStored(home), findings={"traces": ", ".join(found)})


def traces(protected: TensorSource, base: TensorSource, freedoms: Freedoms) -> tuple[str, ...]:
    """What may have been traded between tensors, by name; empty for a fine-tune and for changes of basis.

    The streams of ``protected`` must be in the basis of ``base``; its heads and hidden units may be in any.
    """

    def comparable(name: str | None) -> bool:
        return name is not None and is_comparable(name, protected, base)

    def stored(name: str) -> tuple[Tensor, Tensor]:
        return protected.tensor(name), base.tensor(name)

    def both(name: str) -> tuple[Tensor, Tensor]:
        return protected.tensor(name).double(), base.tensor(name).double()

    found: list[str] = []
    biases = [norm.bias for norm in freedoms.norms if norm.bias is not None and comparable(norm.bias)]
    if _is_away(both(bias) for bias in biases):
        found.append("norm bias")
    outputs = [value.output_bias for value in freedoms.values if comparable(value.output_bias)]
    if _is_away(both(output) for output in outputs):
        found.append("value bias")

    if any(_are_away(rows, protected, base) for rows in freedoms.sums):
        found.append(SUMMED)

    kinds = ("key bias", "unseen reading", "unseen writing", "router", POSITION_BIAS)
    unseen = {kind: _Share() for kind in kinds}
    for table in filter(comparable, freedoms.position_biases):
        for side, weight in enumerate(stored(table)):
            unseen[POSITION_BIAS].add_to(side, weight.T)
    weight_of = {bias: reader.weight for bias, (_, reader) in freedoms.reader_of_bias.items()}
    for bias, places in freedoms.keys:
        if comparable(bias) and comparable(weight_of.get(bias)):
            reader = freedoms.reading[weight_of[bias]][1]
            rows = [along(weight, reader.axis)[places.flatten()] for weight in stored(reader.weight)]
            unseen["key bias"].add([vector[places.flatten()] for vector in both(bias)], rows)
    ratios: dict[str, list[tuple[Tensor, Tensor]]] = {"norm gain": [], "layer scale": []}
    for norm in freedoms.norms:
        if not comparable(norm.gain):
            continue
        gains = [gain + norm.offset for gain in both(norm.gain)]
        norms = [torch.zeros_like(gain) for gain in gains]
        for reader in norm.readers:
            if not comparable(reader.weight):
                continue
            for side, weight in enumerate(stored(reader.weight)):
                for columns in copies_of(weight, reader, len(gains[side])):
                    norms[side] += squares_along(columns, -1)
                    if norm.is_blind:
                        unseen["unseen reading"].add_to(side, columns, gains[side])
        if norm.trades_gain:
            ratios["norm gain"].append((_log_ratio(*gains), _log_ratio(*norms) / 2))
    for writer in freedoms.writers:
        if comparable(writer.tensor) and writer.is_blind and writer.is_matrix:
            for side, weight in enumerate(stored(writer.tensor)):
                scale = None if writer.layer_scale is None else both(writer.layer_scale)[side]
                unseen["unseen writing"].add_to(side, along(weight, writer.axis), scale)
        if writer.layer_scale is not None and writer.is_matrix and comparable(writer.layer_scale):
            scales = both(writer.layer_scale)
            norms = [squares_along(weight, writer.axis) for weight in stored(writer.tensor)]
            ratios["layer scale"].append((_log_ratio(*scales), _log_ratio(*norms) / 2))
    for router in freedoms.routers:
        if comparable(router):
            for side, weight in enumerate(stored(router)):
                unseen["router"].add_to(side, weight.T)
    found += [kind for kind, pairs in ratios.items() if _is_traded(pairs)]
    found += [kind for kind, share in unseen.items() if share.is_larger]
    layer_scales = {writer.layer_scale for writer in freedoms.writers if writer.layer_scale is not None}
    if "layer scale" not in found and _is_away(both(scale) for scale in sorted(layer_scales) if comparable(scale)):
        found.append("layer scale")
    return tuple(found)


def is_comparable(name: str, protected: TensorSource, base: TensorSource) -> bool:
    """Whether both have this tensor, in one shape."""
    return name in base.index.entries and protected.spec(name).shape == base.spec(name).shape


def balanced(protected: TensorSource, base: TensorSource, architecture: Architecture) -> tuple[TensorSource, Gauge]:
    """``protected`` with factors no further apart in scale than the base's, and the powers of two that did it.

    Queries times 2^100 against keys by 2^100 are a change of basis like another; but squares of such numbers, added up,
    leave nothing of their neighbours. The checkpoint itself, and an empty gauge, where nothing is extreme.
    """
    symmetry = architecture.symmetry
    ours, theirs = Reader(protected, symmetry), Reader(base, symmetry)
    legs = legs_by_space(symmetry)
    elements: dict[str, Element] = {}
    for name, space in symmetry.select("query_key", "value_output", "feed_forward").items():
        tensors = [tensor for tensor, _ in legs[name]]
        is_comparable = all(
            tensor in base.index.entries and protected.spec(tensor).shape == base.spec(tensor).shape
            for tensor in tensors
        )
        powers = _powers(space, legs[name], ours, theirs) if space.group.kind in SCALABLE and is_comparable else None
        if powers is not None and bool(powers.any()):
            order = torch.arange(space.size).expand(space.blocks, -1).clone()
            elements[name] = Monomial(order, 2.0**powers)
    gauge = fixed_gauge(symmetry.spaces, elements)
    return (GaugedSource(protected, ours.under(gauge)) if elements else protected), gauge


def _powers(space: Space, legs: Sequence[tuple[str, Leg]], ours: Reader, theirs: Reader) -> Tensor:
    """Exponents of two, [blocks, size], that bring the two sides of a space as far apart as the base's; 0 if near."""
    names = list(dict.fromkeys(tensor for tensor, _ in legs))
    pairs = leg_pairs(space, legs, ours(names), theirs(names), ours.symmetry.gain_offset)
    vectors, covectors = (diagonal_moments(space, pairs, variance) for variance in ("vector", "covector"))
    apart = _log2(covectors.protected) - _log2(vectors.protected) + _log2(vectors.base) - _log2(covectors.base)
    if space.group.pairing is not None:
        first, second = pair_indices(space.size, space.group.pairing)
        apart = over_pairs(space, (apart[:, first] + apart[:, second]) / 2)
    return torch.where(apart.abs() / 2 > EXTREME, (apart / 4).round(), 0.0)


def _log2(values: Tensor) -> Tensor:
    """0 where a value is."""
    return torch.where(values > 0, torch.where(values > 0, values, 1.0).log2(), 0.0)


class _Share:
    """The part of weights that is not seen, as a share of their squares: the checkpoint's and the base's."""

    def __init__(self) -> None:
        self._unseen, self._whole = [0.0, 0.0], [0.0, 0.0]

    def add(self, unseen: list[Tensor], whole: list[Tensor]) -> None:
        for side in range(2):
            self._unseen[side] += squares(unseen[side])
            self._whole[side] += squares(whole[side])

    def add_to(self, side: int, columns: Tensor, factors: Tensor | None = None) -> None:
        """Weights [..., width], of which their mean over the last axis is not seen, times ``factors`` [width]."""
        for (piece,) in pieces(columns.reshape(-1, columns.shape[-1]), flat=False):
            scaled = piece if factors is None else piece * factors
            self._unseen[side] += float(scaled.mean(-1).square().sum()) * scaled.shape[-1]
            self._whole[side] += float(scaled.square().sum())

    @property
    def is_larger(self) -> bool:
        ours, theirs = (part / whole if whole else 0.0 for part, whole in zip(self._unseen, self._whole, strict=True))
        return ours > LARGER * theirs + FLOOR


def _is_away(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    away = whole = 0.0
    for ours, theirs in pairs:
        away, whole = away + float((ours - theirs).square().sum()), whole + float(theirs.square().sum())
    return away > MOVED**2 * whole


def _are_away(rows: Sequence[Rows], protected: TensorSource, base: TensorSource) -> bool:
    """Whether rows moved together by much of their length, or of that of the longest they are added to."""
    moved, lengths = [0.0], [0.0]
    for one in rows:
        if one.tensor not in base.index.entries:
            continue
        ours, theirs = (one.of(side.tensor(one.tensor).double()) for side in (protected, base))
        if ours.shape[-1] != theirs.shape[-1]:
            continue
        common = min(len(ours), len(theirs))
        moved.append(float((ours[:common] - theirs[:common]).mean(0).square().sum()))
        lengths.append(float(theirs.square().sum()) / len(theirs))
    return max(moved) > MOVED**2 * max(lengths)


def _log_ratio(ours: Tensor, theirs: Tensor) -> Tensor:
    """The logarithm of |ours / theirs|; 0 where one of them is."""
    is_known = (ours != 0) & (theirs != 0)
    return torch.where(is_known, (torch.where(is_known, ours, 1.0) / torch.where(is_known, theirs, 1.0)).abs().log(), 0)


def _is_traded(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether scales moved, and the norms of what lies beside them moved against it: each by itself, or all alike."""
    if not pairs:
        return False
    middles = torch.stack([torch.stack([scales.median(), norms.median()]) for scales, norms in pairs])
    # A change of basis may make all norms beside one scale larger: single ones are compared with the middle.
    single = torch.cat([torch.stack([scales - scales.median(), norms - norms.median()], 1) for scales, norms in pairs])
    return any(
        float(moved[:, 0].square().mean()) > least**2
        and float(moved.sum(1).square().mean()) < TRADED * float(moved[:, 0].square().mean())
        for moved, least in ((single, SEEN), (middles, SEEN_ALIKE))
    )


canonicalise = in_memory(Canonicalise)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
