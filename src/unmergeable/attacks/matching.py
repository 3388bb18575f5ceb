"""A permutation read off a matrix of similarities, and how clear it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmergeable.gauge.assignment import best_assignment
from unmergeable.gauge.elements import Monomial


@dataclass(frozen=True)
class Match:
    """A permutation, and how clear it was.

    ``margin``, from 0 to 1: by how much a coordinate is more similar to its match than to any other, relative to the
    former; the median over coordinates. Near 0 the permutation is a guess.
    """

    permutation: Monomial
    margin: float

    @classmethod
    def of(cls, index: Tensor, margins: Tensor) -> Match:
        """Of the match and the margin of every coordinate, int64 and float [size]."""
        return cls(Monomial(index[None], torch.ones(1, len(index), dtype=torch.float64)), float(margins.median()))


def match(similarity: Tensor) -> Match:
    """The permutation that puts the most similar coordinates in the base's places; ``similarity`` [base, protected]."""
    if len(similarity) == 1:
        return Match.of(torch.zeros(1, dtype=torch.long), torch.ones(1))
    index = best_assignment(similarity)
    return Match.of(index, margins(similarity, index))


def margins(similarity: Tensor, index: Tensor) -> Tensor:
    """By how much each row's match ``index`` leads over every other column, relative to it: from 0 to 1, [rows]."""
    matched = similarity.gather(1, index[:, None])[:, 0]
    if similarity.shape[1] == 1:
        return torch.ones(len(similarity))
    best, second = similarity.topk(2, dim=1).values.unbind(1)
    others = torch.where(matched < best, best, second)
    return torch.where(matched > 0, 1 - others / matched, 0.0).clamp(0, 1)
