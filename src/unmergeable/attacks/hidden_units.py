"""Hidden units of a release and those of the base that they were: by what a protection leaves of them.

With rows g, u (gate, up) and columns d (down) of a unit, and g0, u0, d0 the base's:

    only permuted              <u, u0> + <d, d0>                the exact objective of the nearest permutation
    scaled by c > 0 (relu)     cos(u, u0) + cos(d, d0)
    scaled by c, gated         cos(g, g0) + cos(u, u0) cos(d, d0)        no scale or sign of c changes it

Every matrix of similarities goes to :func:`~unmergeable.gauge.assignment.best_assignment`. The published attack on
PaRaMS (arXiv 2503.07661) uses the first line throughout: :func:`permuted_similarity`.

A unit has thousands of weights, and is known by far fewer: the cosine of :data:`SAMPLE` weights of two units that have
nothing in common is 0 +- 1 / sqrt(SAMPLE), that of a unit and its origin near 1. So all units are compared by a sample
first, and by all their weights where that leaves a doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from unmergeable.architecture import FeedForward
from unmergeable.architecture.blocks import Heads
from unmergeable.attacks.matching import Match, margins, match
from unmergeable.gauge.assignment import best_assignment
from unmergeable.randomness import Stream

Tensors = Mapping[str, Tensor]

UnitSimilarity = Callable[[FeedForward, Tensors, Tensors], Tensor]
"""``similarity(block, protected, base)``: float32 [base's hidden units, protected hidden units]."""

CHUNK_ELEMENTS = 1 << 24
"""Entries of a matrix of similarities computed at a time (64 MiB in float32)."""

SAMPLE = 256
"""Weights of a unit in each matrix that are looked at first, where it has four times as many."""

CLEAR = 0.5
"""A unit is known by its sample if every other is less similar by this share. Between units that have nothing in common
cosines of a sample reach 6 / sqrt(SAMPLE) = 0.375, so that nothing is known by chance."""


def match_units(block: FeedForward, protected: Tensors, base: Tensors, similarity: UnitSimilarity) -> Match:
    """The permutation of hidden units, by the weights that make them and those that read them."""
    plain, ours = _apart(block, protected)
    _, theirs = _apart(block, base)
    samples = _samples(plain, ours)
    if samples is None:
        return match(similarity(plain, ours, theirs))
    seen = similarity(plain, *(_sampled(tensors, samples) for tensors in (ours, theirs)))
    most, index = seen.max(1)
    leads = margins(seen, index)
    # Both say so: the base's unit has nothing like this one, and this one has nothing like the base's.
    is_known = (leads > CLEAR) & (most == seen.amax(0)[index])
    del seen
    rows = (~is_known).nonzero().flatten()
    if len(rows) > block.size // 2:
        return match(similarity(plain, ours, theirs))
    if len(rows):
        is_free = torch.ones(block.size, dtype=torch.bool)
        is_free[index[is_known]] = False
        columns = is_free.nonzero().flatten()
        fewer = replace(plain, size=len(rows))
        rest = similarity(fewer, _chosen(ours, columns), _chosen(theirs, rows))
        found = best_assignment(rest)
        index[rows], leads[rows] = columns[found], margins(rest, found)
    return Match.of(index, leads)


def unit_similarity(block: FeedForward, protected: Tensors, base: Tensors) -> Tensor:
    """Similarity of hidden units whatever scale and sign the architecture lets each of them carry."""
    if block.gate is None and block.activation != "relu":
        return permuted_similarity(block, protected, base)
    up, down = (_cosines(_sides(heads, block.size, protected, base)) for heads in (block.up, block.down))
    if block.gate is None:
        return _by_rows(block.size, lambda rows: up(rows) + down(rows))
    gate = _cosines(_sides(block.gate, block.size, protected, base))
    return _by_rows(block.size, lambda rows: gate(rows) + up(rows) * down(rows))


def permuted_similarity(block: FeedForward, protected: Tensors, base: Tensors) -> Tensor:
    """Similarity of hidden units that carry no scale: inner products over all their weights."""
    factors = [_sides(heads, block.size, protected, base) for _, heads in _members(block)]
    return _by_rows(block.size, lambda rows: torch.stack([theirs[rows] @ ours.T for theirs, ours in factors]).sum(0))


def _members(block: FeedForward) -> list[tuple[str, Heads]]:
    every = (("gate", block.gate), ("up", block.up), ("down", block.down))
    return [(name, heads) for name, heads in every if heads is not None]


def _apart(block: FeedForward, tensors: Tensors) -> tuple[FeedForward, dict[str, Tensor]]:
    """The block and its tensors with nothing but its hidden units in them, as rows, views where they can be, in place
    of its names on disk, of which several may mean one tensor."""
    found: dict[str, Tensor] = {}
    parts: dict[str, Heads] = {}
    for name, heads in _members(block):
        found[name] = _rows(heads, heads.axis, block.size, tensors[heads.weight]).flatten(1)
        bias = None
        if heads.bias is not None:
            bias = f"{name}.bias"
            found[bias] = _rows(heads, heads.bias_axis, block.size, tensors[heads.bias])
        parts[name] = Heads(name, bias, 0, 0, 0)
    return replace(block, gate=parts.get("gate"), up=parts["up"], down=parts["down"]), found


def _samples(block: FeedForward, tensors: Tensors) -> dict[str, Tensor] | None:
    """Which weights of a unit are looked at, by matrix; None where looking at all costs little more."""
    lengths = {name: tensors[name].shape[1] for name, _ in _members(block)}
    if min(*lengths.values(), block.size) < 4 * SAMPLE:
        return None
    stream = Stream.from_seed(0).child("hidden units")
    orders = {name: stream.child(name).permutations(1, length)[0] for name, length in lengths.items()}
    return {name: torch.from_numpy(order[:SAMPLE]) for name, order in orders.items()}


def _sampled(tensors: Tensors, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.index_select(1, samples[name]) if name in samples else tensor for name, tensor in tensors.items()
    }


def _chosen(tensors: Tensors, units: Tensor) -> dict[str, Tensor]:
    return {name: tensor.index_select(0, units) for name, tensor in tensors.items()}


def _by_rows(size: int, similarity: Callable[[slice], Tensor]) -> Tensor:
    """A [size, size] matrix from a function of some of its rows."""
    whole = torch.empty(size, size)
    step = max(1, CHUNK_ELEMENTS // size)
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        whole[rows] = similarity(rows)
    return whole


def _cosines(sides: tuple[Tensor, Tensor]) -> Callable[[slice], Tensor]:
    """Cosines between some of the base's units and all protected ones; a unit of zeros is similar to none."""
    theirs, ours = (side / side.norm(dim=1, keepdim=True).clamp(min=1e-30) for side in sides)
    return lambda rows: theirs[rows] @ ours.T


def _sides(heads: Heads, size: int, protected: Tensors, base: Tensors) -> tuple[Tensor, Tensor]:
    return _units(heads, size, base), _units(heads, size, protected)


def _units(heads: Heads, size: int, tensors: Tensors) -> Tensor:
    """Hidden units as the rows of a float32 matrix, with their biases as one more column."""
    columns = [_rows(heads, heads.axis, size, tensors[heads.weight]).flatten(1)]
    if heads.bias is not None:
        columns.append(_rows(heads, heads.bias_axis, size, tensors[heads.bias])[:, None])
    return torch.cat(columns, dim=1).float()


def _rows(heads: Heads, axis: int, size: int, tensor: Tensor) -> Tensor:
    """A view of what hidden units have of a tensor, or of the slice of it that they lie in: one row for each."""
    places = slice(heads.offset, heads.offset + size * heads.element_stride, heads.element_stride)
    if heads.slice is None:
        return tensor.movedim(axis, 0)[places]
    return tensor[heads.slice].movedim(axis - 1, 0)[places]
