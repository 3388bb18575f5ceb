"""Where a task vector went: for queries and keys, values and output, and the feed-forward of every layer.

For each part of each block the Gram matrix of the models' task vectors and the base holds everything one asks about:

    distance     ||theta_i - theta_0|| / ||theta_0||             how far the part is from its base
    norm ratio   ||tau_i|| / ||tau_j||                           1 where nothing was lost or inflated
    cosine       <tau_i, tau_j> / (||tau_i|| ||tau_j||)          1 where it still points the same way

With j the expert and i what was released of it, a protection in another basis shows as a large distance with a cosine
near 0, and its canonical form as the expert's own distance with a cosine near 1; a mask as a norm ratio below 1. One
pass over the files serves any number of models, one tensor of each in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.attacks.distance import Part, PartName, Section, parts, require_comparable
from unmergeable.attacks.task_vectors import inner_products
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class PartGram:
    """Inner products in one part of a block: float64 [n + 1, n + 1].

    Of the task vectors of n models, numbered as they were given, and of the base in the last row.
    """

    block: str
    part: PartName
    gram: Tensor

    def distance(self, model: int) -> float:
        """Relative Frobenius distance of a model to the base; infinite where the base is zero and the model is not."""
        return _ratio(self._norm(model), self._norm(-1))

    def norm_ratio(self, model: int, other: int) -> float:
        """Length of a model's task vector in units of another's; infinite where that one is zero and it is not."""
        return _ratio(self._norm(model), self._norm(other))

    def cosine(self, model: int, other: int) -> float:
        """Of the angle between two task vectors, from -1 to 1; 0 where one of them is zero."""
        norms = self._norm(model) * self._norm(other)
        return max(-1.0, min(1.0, float(self.gram[model, other]) / norms)) if norms else 0.0

    def _norm(self, row: int) -> float:
        return math.sqrt(max(0.0, float(self.gram[row, row])))


def part_grams(
    models: Sequence[TensorSource], base: TensorSource, architecture: Architecture, progress: Progress = silent
) -> tuple[PartGram, ...]:
    """The Gram matrix of every part of every block, in the order of the network.

    Raises:
        Mismatch: a model lacks a tensor of these parts, or has it in another shape than the base.
        BadInput: one of them holds NaN or infinity there.
    """
    every = parts(architecture)
    for model in models:
        require_comparable(model, base, every)
    found = []
    for part in every:
        found.append(PartGram(part.block, part.name, _gram(part, models, base)))
        progress("comparing", len(found), len(every), "parts")
    return tuple(found)


def taken_together(grams: Iterable[PartGram], block: str) -> tuple[PartGram, ...]:
    """One Gram matrix for each kind of part, over all its blocks, named ``block``."""
    found: dict[PartName, PartGram] = {}
    for one in grams:
        before = found.get(one.part)
        total = one.gram if before is None else before.gram + one.gram
        found[one.part] = replace(one, block=block, gram=total)
    return tuple(found.values())


@dataclass(frozen=True)
class _SectionSource(DerivedSource):
    """Tensors cut down to a section; their specs are those of the whole."""

    section: Section

    def tensor(self, name: str) -> Tensor:
        return self.section.of(self.original.tensor(name))


def _gram(part: Part, models: Sequence[TensorSource], base: TensorSource) -> Tensor:
    size = len(models) + 1
    total = torch.zeros(size, size, dtype=torch.float64)
    for section in part.sections:
        ours = [_SectionSource(model, section) for model in models]
        total += inner_products(ours, _SectionSource(base, section), section.tensor)
    return total


def _ratio(length: float, other: float) -> float:
    if other == 0:
        return math.inf if length else 0.0
    return length / other
