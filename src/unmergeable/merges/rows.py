"""Embeddings whose vocabularies differ: rows are merged with the rows of the same token.

A row that a model does not have takes no part in what it learnt: the base's row stands in, so that its task vector is
zero there. A token that the base does not have either keeps the row of the one model that knows it, or the mean of
those that do, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from unmergeable.errors import Mismatch
from unmergeable.merges.blocks import (
    Operand,
    accumulation_dtype,
    in_compute_dtype,
    in_one_dtype,
    regrouped,
    tensor_operand,
)

Place = tuple[int, int]
"""A model by its number among the operands, and a row of it."""

ZERO = "zero"


@dataclass(frozen=True)
class Alignment:
    """For each row of the result, the row of the same token in every model.

    Attributes:
        rows: for each model, the row there of every row of the result; None where it has none.
        base: which of the models is the base; None without one.
        sources: rows whose source was chosen: a place, or ``ZERO``; it stands in where a model lacks the token.
        forced: rows of ``sources`` that are so in every model, whatever it has.
    """

    rows: tuple[tuple[int | None, ...], ...]
    base: int | None = None
    sources: Mapping[int, Place | str] = field(default_factory=dict)
    forced: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        """How many rows the result has."""
        return len(self.rows[0])

    def aligned(self, operands: Sequence[Operand]) -> tuple[Operand, ...]:
        """The operands with the rows of the result, in one dtype. Nothing is read before they are."""
        operands = in_one_dtype(operands)
        heights = [operand.shape[0] for operand in operands]
        known = [
            [row if row is not None and row < heights[m] else None for row in rows] for m, rows in enumerate(self.rows)
        ]
        standing_in = {
            row: self._source(row, [places[row] for places in known])
            for row in range(self.size)
            if row in self.forced or any(places[row] is None for places in known)
        }
        means = {
            row: number for number, row in enumerate(r for r, source in standing_in.items() if isinstance(source, list))
        }
        if means:  # a mean has more digits than what it is made of
            operands = in_compute_dtype(operands)
        extra = _MeanRows(operands, [standing_in[row] for row in means])

        def place(model: int, row: int) -> Place:
            own = known[model][row]
            if own is not None and row not in self.forced:
                return model, own
            source = standing_in[row]
            if isinstance(source, tuple):
                return source
            return len(operands), means[row] if isinstance(source, list) else len(means)

        return tuple(
            _stitched(operands, extra, model, _runs(place(model, row) for row in range(self.size)))
            for model in range(len(operands))
        )

    def _source(self, row: int, known: Sequence[int | None]) -> Place | list[Place] | str:
        if row in self.sources:
            source = self.sources[row]
            if isinstance(source, tuple) and source[1] < 0:
                raise Mismatch(f"row {row} of the merge is to come from a model that has no such token.")
            return source
        have = [(model, own) for model, own in enumerate(known) if own is not None]
        if self.base is not None and known[self.base] is not None:
            return next(place for place in have if place[0] == self.base)
        if len(have) == 1:
            return have[0]
        return have or ZERO


@dataclass
class _MeanRows:
    """Rows that are the mean of several models' (the last one is zero), computed when they are first read."""

    operands: Sequence[Operand]
    places: Sequence[object]
    _tensor: Tensor | None = None

    def read(self) -> Tensor:
        if self._tensor is None:
            first = self.operands[0]
            width = torch.Size(first.shape[1:])
            rows = torch.zeros((len(self.places) + 1, *width), dtype=accumulation_dtype(first.dtype))
            for number, places in enumerate(self.places):
                assert isinstance(places, list)
                rows[number] = sum(self._row(*place) for place in places) / len(places)
            self._tensor = rows
        return self._tensor

    def _row(self, model: int, row: int) -> Tensor:
        operand = self.operands[model]
        blocks = list(_rows_of(operand, row, 1, max(1, operand.numel)))
        return torch.cat(blocks).reshape(operand.shape[1:]).to(accumulation_dtype(operand.dtype), copy=True)


def _runs(places: Iterable[Place]) -> list[tuple[int, int, int]]:
    """Consecutive rows of one model as ``(model, first row, count)``."""
    numbered = enumerate(places)
    runs = []
    for _, group in groupby(numbered, key=lambda item: (item[1][0], item[1][1] - item[0])):
        members = [place for _, place in group]
        runs.append((*members[0], len(members)))
    return runs


def _stitched(
    operands: Sequence[Operand], extra: _MeanRows, model: int, runs: Sequence[tuple[int, int, int]]
) -> Operand:
    own = operands[model]
    height = sum(count for _, _, count in runs)
    if runs == [(model, 0, own.shape[0])]:
        return own

    def read(size: int) -> Iterator[Tensor]:
        return regrouped(pieces(size), size)

    def pieces(size: int) -> Iterator[Tensor]:
        for source, start, count in runs:
            operand = tensor_operand("mean", extra.read()) if source == len(operands) else operands[source]
            for block in _rows_of(operand, start, count, size):
                yield block.to(own.dtype, copy=True)

    return replace(own, shape=(height, *own.shape[1:]), read=read, rows=None)


def _rows_of(operand: Operand, start: int, count: int, size: int) -> Iterable[Tensor]:
    if operand.rows is not None:
        return operand.rows(start, count, size)
    return _counted(operand, start, count, size)


def _counted(operand: Operand, start: int, count: int, size: int) -> Iterator[Tensor]:
    """Rows of what is computed in one piece: read past what comes before."""
    width = operand.numel // max(1, operand.shape[0])
    first, stop, position = start * width, (start + count) * width, 0
    for block in operand.read(size):
        piece = block[max(0, first - position) : max(0, stop - position)]
        if len(piece):
            yield piece
        position += len(block)
        if position >= stop:
            return


def by_number(heights: Sequence[int], size: int) -> tuple[tuple[int | None, ...], ...]:
    """Rows of the same number belong together."""
    return tuple(tuple(row if row < height else None for row in range(size)) for height in heights)


def by_token(
    tokens: Mapping[int, str], size: int, vocabulary: Mapping[str, int], height: int
) -> tuple[int | None, ...]:
    """For each row of the result the row of the same token in a model of ``height`` rows.

    Rows without a token, which pad a vocabulary, belong together by number where the model's have none either.
    """
    taken = set(vocabulary.values())

    def own(row: int) -> int | None:
        token = tokens.get(row)
        found = vocabulary.get(token) if token is not None else (None if row in taken else row)
        return found if found is not None and found < height else None

    return tuple(own(row) for row in range(size))


def is_in_place(alignment: Alignment, heights: Sequence[int]) -> bool:
    """Whether every model has every row at its own place: nothing needs to be aligned."""
    return (
        all(
            height == alignment.size and list(rows) == list(range(alignment.size))
            for rows, height in zip(alignment.rows, heights, strict=True)
        )
        and not alignment.forced
    )


__all__ = ["ZERO", "Alignment", "Place", "by_number", "by_token", "is_in_place"]
