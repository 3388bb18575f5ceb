"""Exact magnitudes of given ranks in task vectors that are streamed: what trimming by magnitude needs to know.

Several ranks of several task vectors are searched in the same passes. Over the whole model, digit by digit
(:mod:`unmergeable.quantile`): two passes, and counts that add up over tensors and threads. Over one tensor, a
sample saves one of the two (:mod:`unmergeable.merges.bracket`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Inputs, TermsOf
from unmergeable.merges.blocks import Operand, Scratch, accumulation_dtype, widened_blocks
from unmergeable.merges.bracket import bracketed_magnitudes
from unmergeable.quantile import DIGITS, KthLargest

Ranks = Sequence[Sequence[int]]
"""Per expert, the ranks to look up: 1 is the largest magnitude."""

Magnitudes = tuple[tuple[float, ...], ...]
"""Per expert, the magnitudes of those ranks."""

_Searches = tuple[tuple[KthLargest, ...], ...]


def rank_kept(density: float, size: int) -> int:
    """How many of ``size`` weights are kept: ``density`` of them rounded down, at least one."""
    return max(1, int(density * size))


def tensor_magnitudes(operands: Sequence[Operand], ranks: Ranks, scratch: Scratch) -> Magnitudes:
    """The magnitudes of the given ranks in each expert's task vector of one tensor; the base comes first."""
    if operands[0].device.type == "cpu":
        magnitudes = tuple(map(tuple, bracketed_magnitudes(operands, ranks, scratch)))
        if all(value is not None for values in magnitudes for value in values):
            return cast(Magnitudes, magnitudes)
    dtype = accumulation_dtype(operands[0].dtype)
    return _settle(ranks, dtype, lambda searches: _count_digits(searches, operands, scratch))


def model_magnitudes(inputs: Inputs, ranks: Ranks) -> Magnitudes:
    """The same over all tensors of the model. Passes over the files are reported as ranking."""
    # The widest compute dtype of the model: every magnitude in it is exact.
    dtypes = [accumulation_dtype(inputs.operands(name)[0].dtype) for name in inputs.names]
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    return _settle(
        ranks, dtype, lambda searches: inputs.total(partial(_count_digits, searches), stage="ranking task vectors")
    )


def model_densities(inputs: Inputs, terms: TermsOf, density: float) -> tuple[float, ...]:
    """The density of each expert, ``density`` where the terms name none.

    Raises:
        UsageError: when it differs from tensor to tensor: one threshold for the whole model has one density.
    """
    densities = {terms(name).per_expert("density", density) for name in inputs.names}
    if len(densities) > 1:
        raise UsageError(
            "trim=global ranks the whole task vector and needs one density per expert; set trim=tensor to vary it."
        )
    return densities.pop()


def largest_below(threshold: float, dtype: torch.dtype) -> float | None:
    """The largest number of ``dtype`` below ``threshold``; None where nothing lies below a magnitude of 0."""
    if threshold == 0:
        return None
    rounded = torch.tensor(threshold, dtype=dtype)
    if float(rounded) >= threshold:
        rounded = rounded.nextafter(torch.zeros_like(rounded))
    return float(rounded)


def _settle(ranks: Ranks, dtype: torch.dtype, count: Callable[[_Searches], Tensor]) -> Magnitudes:
    """Run all searches in the same passes; ``count`` makes one and returns what :func:`_count_digits` describes."""
    searches: _Searches = tuple(tuple(KthLargest(rank, dtype) for rank in wanted) for wanted in ranks)
    while any(not search.is_settled for wanted in searches for search in wanted):
        counts = count(searches)
        searches = tuple(
            tuple(search.narrow(count) for search, count in zip(wanted, its_counts, strict=False))
            for wanted, its_counts in zip(searches, counts, strict=True)
        )
    return tuple(tuple(search.value for search in wanted) for wanted in searches)


def _count_digits(searches: _Searches, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
    """Per expert and search, the digit counts over the expert's task vector: int64, (experts, searches, 2^16)."""
    most = max(len(wanted) for wanted in searches)
    counts = torch.zeros(len(searches), most, DIGITS, dtype=torch.int64, device=operands[0].device)
    for (base, *experts), _ in widened_blocks(operands, scratch):
        for its_counts, wanted, expert in zip(counts, searches, experts, strict=True):
            task_vector = expert.sub_(base)
            for number, search in enumerate(wanted):
                if number and search.prefix == wanted[0].prefix:
                    continue  # the same digits of the same values, counted for the first search
                its_counts[number].add_(search.count(task_vector))
    for its_counts, wanted in zip(counts, searches, strict=True):
        for number, search in enumerate(wanted):
            if number and search.prefix == wanted[0].prefix:
                its_counts[number].copy_(its_counts[0])
    return counts
