"""diagonal_ratio: the scale of every coordinate of a head or feed-forward, read off two ratios.

Where a protection multiplied coordinate i of one factor by alpha_i and divided the other by it (PaRaMS, arXiv
2503.07661: queries and keys, values and output), with the base's rows q0, k0,

    a_i = <q'_i, q0_i> / ||q0_i||^2  ~  alpha_i        c_i = <k'_i, k0_i> / ||k0_i||^2  ~  1 / alpha_i
    alpha_i = sign(a_i) sqrt(a_i / c_i)

and dividing by alpha_i undoes it. Under rotary positions both coordinates of a frequency pair share one alpha. Hidden
units of gated and relu feed-forwards are treated alike. Where the two ratios have different signs, the coordinate is
not a scaled one of the base and stays.

It undoes diagonal matrices and nothing else; run after ``neuron_matching`` it completes the published attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.attacks.closed_forms import over_pairs
from unmergeable.attacks.estimate import GaugeAttack, Nearest, Solvers
from unmergeable.attacks.in_memory import fit_in_memory
from unmergeable.attacks.moments import LegPair, diagonal_moments
from unmergeable.gauge.elements import Monomial, Rotary, pair_indices


@dataclass(frozen=True)
class DiagonalRatio(GaugeAttack):
    """The ratios alone; no settings."""

    name: ClassVar[str] = "diagonal_ratio"
    summary: ClassVar[str] = "scales of head coordinates and hidden units, read off their ratios to the base"

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases in which a coordinate, or a frequency pair, may have a scale of its own."""
        spaces = architecture.symmetry.select("query_key", "value_output", "feed_forward")
        return {name: space for name, space in spaces.items() if space.group.kind in RATIOS}

    @property
    def solvers(self) -> Solvers:
        return Solvers(RATIOS)


def ratio(vector: Tensor, vector_norm: Tensor, covector: Tensor, covector_norm: Tensor) -> Tensor:
    """1 / alpha from <x', x0> and ||x0||^2 of either side, elementwise; 1 where they contradict each other."""
    a, c = vector / vector_norm, covector / covector_norm
    is_scale = (a * c > 0) & (a / c).isfinite()
    return torch.where(is_scale, torch.sign(a) * torch.where(is_scale, c / a, 1.0).sqrt(), 1.0)


def _per_coordinate(space: Space, legs: Sequence[LegPair]) -> Monomial:
    vectors, covectors = (diagonal_moments(space, legs, variance) for variance in ("vector", "covector"))
    scale = ratio(vectors.cross, vectors.base, covectors.cross, covectors.base)
    return Monomial(torch.arange(space.size).expand(space.blocks, -1).clone(), scale)


def _positive_per_coordinate(space: Space, legs: Sequence[LegPair]) -> Monomial:
    element = _per_coordinate(space, legs)
    return Monomial(element.index, element.scale.abs())


def _per_pair(space: Space, legs: Sequence[LegPair]) -> Rotary:
    assert space.group.pairing is not None
    return Rotary(_ratio_of_pairs(space, legs).to(torch.complex128), space.group.pairing)


def _positive_per_pair(space: Space, legs: Sequence[LegPair]) -> Monomial:
    scale = over_pairs(space, _ratio_of_pairs(space, legs).abs())
    return Monomial(torch.arange(space.size).expand(space.blocks, -1).clone(), scale)


def _ratio_of_pairs(space: Space, legs: Sequence[LegPair]) -> Tensor:
    assert space.group.pairing is not None
    first, second = pair_indices(space.size, space.group.pairing)
    sides = [diagonal_moments(space, legs, variance) for variance in ("vector", "covector")]
    sums = [values[:, first] + values[:, second] for side in sides for values in (side.cross, side.base)]
    return ratio(*sums)


RATIOS: dict[GroupKind, Nearest] = {
    "general_linear": _per_coordinate,
    "rotary": _per_pair,
    "pair_scale": _positive_per_pair,
    "diagonal": _per_coordinate,
    "positive_diagonal": _positive_per_coordinate,
}


diagonal_ratio = fit_in_memory(DiagonalRatio)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
