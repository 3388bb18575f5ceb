"""gauge: the largest exact symmetry of the architecture, in one pass.

Every basis that the network cannot see is changed at once, each by a secret element of the largest group the
architecture leaves it (``docs/symmetries.md`` lists them):

    attention      Q' = A Q, K' = A^-T K, V' = B V, O' = O B^-1     as ``mergelock``
    heads          key-value heads in another order, each with its query heads
    feed_forward   hidden units in another order; scales where the activation lets them by
    experts        experts in another order, with the rows of their router
    norms          g' = D g in a norm, W' = W D^-1 in all that reads it
    residual       x' = R x for the residual stream: everything that writes to it, everything that reads it

R is any rotation where only RMS norms see the stream. Between a norm and its readers there is a gain g, with which a
rotation does not commute; so diag(g) is moved into the readers, the stream rotated, and diag(g) moved back:

    W' = W diag(g) R^T diag(g)^-1

in one product, rounded once. The gains themselves stay as they are stored, bit by bit, so that a restored checkpoint
needs nothing but the key: no list of gains that were folded away. Scaling a column moves no relative error, so this
costs the function no precision. What restoring cannot bring back is a column of W behind a gain far below the others:
it was added to larger ones and rounded with them, and returns with their error, max|g| / |g_j| times as large as
theirs. The network multiplies it by g_j and does not see it.

Elsewhere (LayerNorm, norms behind a block, tied embeddings) R is a permutation with the signs the architecture allows,
which moves numbers and rounds none; ``untie`` stores a tied output head apart for the larger group.

``quantisation=kept`` draws from what is left when weights that are quantised together stay together
(:mod:`unmergeable.gauge.grouped`): orders, signs and quarter turns, also of a stream that could be rotated, so that no
gain is divided by. It is what ``protect`` takes by itself.

Applied left to right; a merge of the result with anything of the same base adds numbers of different coordinates in
every tensor. What it does not stop: somebody who holds the base. The point of the orbit nearest to the base is as near
as the unprotected expert, and each step is a least-squares or assignment problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.residual import Norm
from unmergeable.architecture.symmetry import Role
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import Gauge, fixed_gauge, sampled_gauge
from unmergeable.gauge.grouped import kept_gauge, kept_spaces
from unmergeable.gauge.groups import fast_rotation, sample
from unmergeable.protections.exact import ExactProtection, Quantisation, Weights
from unmergeable.randomness import Stream
from unmergeable.settings import ADDED_LATER

Rotation = Literal["dense", "fast"]


@dataclass(frozen=True)
class LargestGauge(ExactProtection):
    """Parts to change, all by default. ``condition``: bound on the condition number of each matrix.

    ``quantisation_friendly``: orthogonal matrices, permutations and signs only, which keep 4-bit formats as good as
    they were. ``untie``: store the output head apart from the embedding, where that is what keeps rotations out.
    ``rotation`` of a stream: ``dense``, from the Haar measure, or ``fast``, Walsh-Hadamard factors behind a signed
    permutation, which take a twentieth of the arithmetic at a width of 4096. ``quantisation``: ``kept``, where no
    matrix mixes coordinates and the settings above have no use, or ``free``. ``part``: the only part of a network of
    several that is changed (:mod:`unmergeable.architecture.parts`); empty for all.
    """

    name: ClassVar[str] = "gauge"
    summary: ClassVar[str] = "every change of basis the architecture allows, at once; that of hidden states too"

    condition: float = 4.0
    quantisation_friendly: bool = False
    untie: bool = False
    rotation: Rotation = field(default="dense", metadata=ADDED_LATER)
    quantisation: Quantisation = field(default="free", metadata=ADDED_LATER)
    part: str = field(default="", metadata=ADDED_LATER)
    attention: bool = True
    heads: bool = True
    feed_forward: bool = True
    experts: bool = True
    norms: bool = True
    residual: bool = True

    def validate(self) -> None:
        self.require(1 <= self.condition <= 1000, "condition", "lie between 1 and 1000")
        if not self._roles:
            raise UsageError("gauge: every part is switched off; leave one on.")
        if self.untie and not self.residual:
            raise UsageError("gauge: untie is for rotating the residual stream; leave residual on, or untie off.")
        self.require_free("quantisation_friendly", "untie")

    @property
    def bound(self) -> float:
        return 1.0 if self.quantisation_friendly or self.is_kept else self.condition

    @property
    def _roles(self) -> tuple[Role, ...]:
        parts: tuple[tuple[bool, tuple[Role, ...]], ...] = (
            (self.attention, ("query_key", "value_output")),
            (self.heads, ("heads",)),
            (self.feed_forward, ("feed_forward",)),
            (self.experts, ("experts",)),
            (self.norms, ("norm",)),
            (self.residual, ("residual",)),
        )
        return tuple(role for is_on, roles in parts if is_on for role in roles)

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases it changes; a stream that can be rotated is not also reordered, and the gains inside it stay.

        Raises BadInput when the architecture has none of the parts that are on.
        """
        symmetry = architecture.symmetry
        rotations = self._rotations(architecture)
        spaces = symmetry.select(*self._roles)
        spaces = kept_spaces(spaces, symmetry) if self.is_kept else spaces
        for stream in architecture.residuals:
            rotation = rotations.get(f"{stream.name}.rotation")
            if rotation is not None:
                spaces = {name: space for name, space in spaces.items() if name not in (stream.name, *rotation.folded)}
        if not spaces and not rotations:
            raise BadInput(f"gauge: a {architecture.family} model has none of the parts that are on; leave others on.")
        return spaces | rotations

    def _rotations(self, architecture: Architecture) -> dict[str, Space]:
        if not self.residual or self.is_kept:
            return {}
        every = architecture.symmetry.select("residual", folding=True)
        return {name: space for name, space in every.items() if space.group.kind == "orthogonal"}

    def gauges(self, architecture: Architecture, stream: Stream, weights: Weights) -> tuple[Gauge, ...]:
        """Everything that stands by itself; then gains into their readers, the rotation, and gains out again.

        Raises:
            BadInput: a gain is zero, so that it cannot be moved back.
        """
        rotations = self._rotations(architecture)
        standing = {name: space for name, space in self.spaces(architecture).items() if name not in rotations}
        if self.is_kept:
            return (kept_gauge(standing, architecture.symmetry, stream),)
        independent = sampled_gauge(standing, stream, self.bound)
        if not rotations:
            return (independent,)
        spaces = architecture.symmetry.spaces
        # Drawn here and kept: a rotation of a wide stream takes seconds, and every tensor asks for it.
        drawn = {
            name: fast_rotation(space, stream.child(name))
            if self.rotation == "fast"
            else sample(space, stream.child(name), self.bound)
            for name, space in rotations.items()
        }
        fold = fixed_gauge(spaces, _gains_to_one(_folded_norms(architecture, rotations), weights.source))
        return (independent, fold, fixed_gauge(spaces, drawn), fold.inverse())

    def require_weights(self, architecture: Architecture, source: TensorSource) -> None:
        _gains_to_one(_folded_norms(architecture, self._rotations(architecture)), source)


def _folded_norms(architecture: Architecture, rotations: Mapping[str, Space]) -> Iterator[Norm]:
    """The norms whose gains are moved out of the way of rotations."""
    folded = {name for space in rotations.values() for name in space.folded}
    return (norm for residual in architecture.residuals for norm in residual.norms if norm.space in folded)


def _gains_to_one(norms: Iterable[Norm], weights: TensorSource) -> Mapping[str, Element]:
    elements: dict[str, Element] = {}
    for norm in norms:
        gain = weights.tensor(norm.gain).to(torch.float64) + norm.offset
        if not bool((gain != 0).all()) or not bool(torch.isfinite(gain).all()):
            raise BadInput(
                f"gauge: tensor {norm.gain} of {weights.description} holds a gain of zero or one that is not finite, "
                "so that the stream cannot be rotated; set residual=false."
            )
        elements[norm.space] = Monomial(torch.arange(len(gain))[None], 1.0 / gain[None])
    return elements
