"""mergebarrier: signs of the strongest directions in every head flipped, and feed-forwards as polynomials.

MergeBarrier (arXiv 2511.10712) has two parts. Attention: one orthogonal P on queries and keys of each key-value head,
which leaves every score alone and moves the weights as far from the others of their base as a flip of k directions can:

    M = Q Q^T + K K^T = U L U^T        P = U diag(-1 on the k largest of L, +1 elsewhere) U^T
    Q' = P Q    K' = P K               ||Q' - Q||^2 + ||K' - K||^2 = 4 (sum of the k largest of L)

Biases follow their rows, and under grouped-query attention Q stacks the query heads of the group. k = d would be
P = -1, which hides nothing. Under rotary positions P must commute with the rotation of every frequency pair, which the
published P does not (``as_published`` applies it all the same, and changes the function): here the phase of the k pairs
of largest energy turns by pi. Behind a norm on queries and keys, the signs of these pairs are flipped.

Feed-forwards become polynomials as in ``taylor_mlp``. Neither order nor basis is published: 8, and Hermite polynomials,
which are the best on average over what a unit sees where a Taylor series would diverge. The paper takes all hidden
units (``as_published``); the few with the widest ranges cost more than all others together and are left alone here.

What it does not stop. P commutes with M, so that M is the same before and after: anybody can compute P from the
protected file alone, and applying the method again undoes it. The polynomials give the projection back to
``recover --method taylor_inversion``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Space, SymmetryMap
from unmergeable.checkpoint.plan import output_like
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.act import edits, leg_view
from unmergeable.gauge.elements import Element, Monomial, Orthogonal, Rotary, pair_indices
from unmergeable.gauge.gauge import Gauge
from unmergeable.polynomials.activations import Basis
from unmergeable.polynomials.layout import Guard
from unmergeable.polynomials.rewriting import Polynomials, Rewriting, UnitRanges, rewriting
from unmergeable.protections.base import Facts, Inputs, ProtectionRequirements, Rewrite
from unmergeable.protections.polynomial import PolynomialFacts, PolynomialProtection

Parts = Literal["attention", "ffn", "both"]

_FLIPPED = ("general_linear", "rotary", "pair_sign")


@dataclass(frozen=True)
class MergeBarrier(PolynomialProtection):
    """``parts``: attention (exact), ffn (approximate), or both.

    ``top_k``: directions, or rotary pairs, of every head to flip; 0 for half of them. ``basis`` of the polynomials, and
    the rest as in ``taylor_mlp``. ``as_published``: dense matrices under rotary positions too, and all hidden units.
    """

    name: ClassVar[str] = "mergebarrier"
    summary: ClassVar[str] = "strongest directions of every head flipped, feed-forwards as polynomials"

    parts: Parts = "both"
    top_k: int = 0
    basis: Basis = "hermite"
    order: int = 8
    share: float = 0.95
    guard: Guard = "clamp"
    mask_order: int = 8
    mask_radius: float = 2.5
    as_published: bool = False

    def validate(self) -> None:
        self.require(self.top_k >= 0, "top_k", "be at least 1, or 0 for half of the head")
        self._polynomials.require_valid(self.name)

    @property
    def _polynomials(self) -> Polynomials:
        share = 1.0 if self.as_published else self.share
        return Polynomials(self.basis, self.order, share, self.guard, self.mask_order, self.mask_radius)

    @property
    def limits(self) -> str:
        if self.parts != "attention":
            return super().limits
        return super().limits.replace(self.remark, "Applying it once more undoes it, and that takes no key.")

    @property
    def attack(self) -> str | None:
        return None if self.parts == "attention" else super().attack

    def requirements(self) -> ProtectionRequirements:
        if self.parts != "attention":
            return super().requirements()
        return ProtectionRequirements(exact=not self.as_published, stage="basis")

    def unsupported(self, family: str) -> str | None:
        return None if self.parts == "attention" else super().unsupported(family)

    def check(self, inputs: Inputs) -> Facts:
        self.spaces(inputs.architecture)
        return PolynomialFacts() if self.parts == "attention" else super().check(inputs)

    def prepare(self, inputs: Inputs) -> Rewrite:
        self.spaces(inputs.architecture)  # a setting that does not fit is refused before the network is loaded
        if self.parts != "attention":
            return super().prepare(inputs)
        flipped = edits(inputs.architecture.symmetry, [self.gauge(inputs.expert, inputs.architecture)])
        return Rewrite(
            source=inputs.expert,
            plan=output_like(inputs.expert, flipped),
            recipe=self.recipe(),
            resume_token=f"polynomials {self.recipe()} None",
            facts=PolynomialFacts(),
        )

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases of queries and keys whose signs can be flipped.

        Raises:
            UsageError: a head has no more than ``top_k`` directions.
            BadInput: the architecture has no such basis.
        """
        if self.parts == "ffn":
            return {}
        found = {
            name: space
            for name, space in architecture.symmetry.select("query_key").items()
            if space.group.kind in _FLIPPED
        }
        if not found:
            raise BadInput(f"mergebarrier: no head of a {architecture.family} model can be flipped; use parts=ffn.")
        for name, space in found.items():
            if self.top_k >= _directions(space, self.as_published):
                raise UsageError(
                    f"mergebarrier: top_k={self.top_k} is not below the {_directions(space, self.as_published)} "
                    f"directions of {name}; all of them flipped would hide nothing."
                )
        return found

    def gauge(self, source: TensorSource, architecture: Architecture) -> Gauge:
        """What is applied to heads. It depends on the weights alone, and is the same for the protected ones."""
        spaces = self.spaces(architecture)

        @cache
        def element(name: str) -> Element:
            moments = head_moments(source, architecture.symmetry, spaces[name])
            return flip(spaces[name], moments, self.top_k, as_published=self.as_published)

        return Gauge(spaces, element)

    def rewriting(
        self, source: TensorSource, architecture: Architecture, ranges: Mapping[str, UnitRanges]
    ) -> Rewriting:
        assert self.parts != "attention", "the attention part is a gauge, and keeps the structure"
        flipped = edits(architecture.symmetry, [self.gauge(source, architecture)])
        return rewriting(source, architecture, ranges, self._polynomials, flipped)


def head_moments(weights: TensorSource, symmetry: SymmetryMap, space: Space) -> Tensor:
    """M = sum of x x^T over the columns and biases of queries and keys, float64 [blocks, size, size]."""
    moments = torch.zeros(space.blocks, space.size, space.size, dtype=torch.float64)
    for name in symmetry.tensors_of({space.name}):
        tensor = weights.tensor(name)
        for leg in symmetry.legs[name]:
            if leg.space == space.name and leg.variance != "gain":
                coordinates = leg_view(tensor, leg, space).to(torch.float64)
                columns = coordinates.movedim((1, -2), (0, 1)).reshape(space.blocks, space.size, -1)
                moments += columns @ columns.mT
    return moments


def flip(space: Space, moments: Tensor, top_k: int, *, as_published: bool = False) -> Element:
    """P of the module docstring: ``top_k`` directions, 0 for half of them. ``as_published``: rotations or not."""
    directions = _directions(space, as_published)
    count = top_k or directions // 2
    if as_published or space.group.kind == "general_linear":
        _, vectors = torch.linalg.eigh(moments)  # in ascending order
        strongest = vectors[..., -count:]
        return Orthogonal(torch.eye(space.size, dtype=torch.float64) - 2 * strongest @ strongest.mT)
    assert space.group.pairing is not None
    first, second = pair_indices(space.size, space.group.pairing)
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)
    energy = diagonal[:, first] + diagonal[:, second]
    signs = torch.ones_like(energy).scatter_(1, energy.topk(count, dim=1).indices, -1.0)
    if space.group.kind == "rotary":
        return Rotary(signs.to(torch.complex128), space.group.pairing)
    scale = torch.empty(space.blocks, space.size, dtype=torch.float64)
    scale[:, first] = scale[:, second] = signs
    return Monomial(torch.arange(space.size).expand(space.blocks, -1), scale)


def _directions(space: Space, as_published: bool) -> int:
    return space.size if as_published or space.group.kind == "general_linear" else space.size // 2
