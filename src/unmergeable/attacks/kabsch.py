"""kabsch: the attack published with MergeLock (arXiv 2509.01548): the nearest rotation of every head onto the base's.

Per head, with queries and keys (or values and output columns) of the base, W0, and of the protected checkpoint, W,

    C = W_Q0 W_Q^T + W_K0 W_K^T = U S V^T        R = U V^T

is the orthogonal matrix that minimises ||R W_Q - W_Q0||^2 + ||R W_K - W_K0||^2 (Kabsch 1976; biases are one more
column), and both are multiplied by it: R^-T = R. It undoes a rotation and nothing else, so that a protection with
scales of its own survives it. Compare with ``nearest_orbit``.

Where the architecture allows less than a free matrix, the paper's R would break the network. There the nearest
isometry of the group that it does allow is used: a phase per frequency pair under rotary positions, signs and quarter
turns behind a norm on queries and keys. The recovered checkpoint is the same function in every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.attacks.closed_forms import (
    nearest_block_sign,
    nearest_diagonal_sign,
    nearest_orthogonal,
    nearest_pair_sign,
    nearest_phase,
    nearest_quarter_turn,
)
from unmergeable.attacks.estimate import GaugeAttack, Nearest, Solvers
from unmergeable.attacks.in_memory import fit_in_memory
from unmergeable.attacks.moments import LegPair, dense_moments
from unmergeable.gauge.elements import Dense, Orthogonal


@dataclass(frozen=True)
class Kabsch(GaugeAttack):
    """The published attack; no settings."""

    name: ClassVar[str] = "kabsch"
    summary: ClassVar[str] = "the nearest rotation of every attention head onto the base's"

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases it rotates: those of attention whose group has isometries beyond the identity."""
        spaces = architecture.symmetry.select("query_key", "value_output")
        return {name: space for name, space in spaces.items() if space.group.kind in NEAREST_ISOMETRY}

    @property
    def solvers(self) -> Solvers:
        return Solvers(NEAREST_ISOMETRY)


def _nearest_orthogonal(space: Space, legs: Sequence[LegPair]) -> Dense:
    return Dense(_procrustes(space, legs))


def _nearest_rotation(space: Space, legs: Sequence[LegPair]) -> Orthogonal:
    return Orthogonal(_procrustes(space, legs))


def _procrustes(space: Space, legs: Sequence[LegPair]) -> Tensor:
    cross = sum(
        (dense_moments(space, legs, variance).cross for variance in ("vector", "covector")),
        start=torch.zeros(space.blocks, space.size, space.size, dtype=torch.float64),
    )
    return nearest_orthogonal(cross)


NEAREST_ISOMETRY: dict[GroupKind, Nearest] = {
    "general_linear": _nearest_orthogonal,
    "orthogonal": _nearest_rotation,
    "rotary": nearest_phase,
    "quarter_turn": nearest_quarter_turn,
    "pair_sign": nearest_pair_sign,
    "block_sign": nearest_block_sign,
    "diagonal": nearest_diagonal_sign,
}


kabsch = fit_in_memory(Kabsch)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
