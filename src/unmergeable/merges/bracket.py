"""Exact magnitudes of given ranks in one tensor, found in a pass and a sample.

Every stride-th weight, sorted, tells between which two magnitudes a rank lies, up to the sampling error. One pass
then counts what lies above, and keeps the few per cent in between to select from. Magnitudes equal to one of the two
are not kept: coarse task vectors have few distinct ones, and one of them may be a third of a tensor. They are counted
where the sample says that the rank may fall on them.

The answer is exact or none: when the sample was misleading the rank is not in the bracket, and the counts say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt

import numpy as np
import numpy.typing as npt
import torch

from unmergeable.merges.blocks import BLOCK_ELEMENTS, Operand, Scratch, accumulation_dtype, widened_blocks

SAMPLE = 2**16
"""Weights in a sample, about. Its bracket then holds two per cent of a tensor, and costs little to sort."""

_DEVIATIONS = 5
"""Half the width of a bracket in standard deviations of a rank in the sample: missed once in a million."""

Magnitudes = npt.NDArray[np.floating]


def bracketed_magnitudes(
    operands: Sequence[Operand], ranks: Sequence[Sequence[int]], scratch: Scratch
) -> list[list[float | None]]:
    """Per expert, the magnitudes of its ranks (1 = largest) in its task vector; None where the sample misled.

    ``operands`` are the base and the experts, on the CPU and not empty.
    """
    size = operands[0].numel
    samples, is_whole = _samples(operands)
    if is_whole:
        return [[float(sample[rank - 1]) for rank in wanted] for sample, wanted in zip(samples, ranks, strict=True)]
    brackets = [
        [_bracket(sample, rank, size) for rank in wanted] for sample, wanted in zip(samples, ranks, strict=True)
    ]
    masks = np.empty((2, BLOCK_ELEMENTS), dtype=bool)
    for (base, *experts), _ in widened_blocks(operands, scratch):
        for expert, wanted in zip(experts, brackets, strict=True):
            magnitudes = expert.sub_(base).abs_().numpy()
            for bracket in wanted:
                bracket.sort_in(magnitudes, masks[:, : len(magnitudes)])
    return [[bracket.magnitude() for bracket in wanted] for wanted in brackets]


@dataclass
class _Bracket:
    """Looks for the magnitude of ``rank`` between ``low`` and ``high``.

    ``reaching`` counts the magnitudes from ``high`` on. Those above it and those at ``low`` are told apart only where
    the magnitude may well be one of the two (``at_ends``).
    """

    rank: int
    low: float
    high: float
    at_ends: bool = False
    reaching: int = 0
    above: int = 0
    at_low: int = 0
    between: list[Magnitudes] = field(default_factory=list)

    def sort_in(self, magnitudes: Magnitudes, masks: npt.NDArray[np.bool_]) -> None:
        """Take note of a block; ``masks`` [2, block] are overwritten."""
        # numpy's comparisons and selections take a fifth of the time of torch's.
        reaching, between = masks
        np.greater_equal(magnitudes, self.high, out=reaching)
        self.reaching += int(np.count_nonzero(reaching))
        np.greater(magnitudes, self.low, out=between)
        np.greater(between, reaching, out=between)
        self.between.append(_select_few(magnitudes, between))
        if self.at_ends:
            self.above += int(np.count_nonzero(np.greater(magnitudes, self.high, out=reaching)))
            if self.low < self.high:
                self.at_low += int(np.count_nonzero(np.equal(magnitudes, self.low, out=reaching)))

    def magnitude(self) -> float | None:
        """What was looked for, after all blocks; None if it lies elsewhere."""
        rank = self.rank - self.reaching
        if rank < 1:
            return self.high if self.at_ends and self.rank > self.above else None
        between = np.concatenate(self.between)
        if rank <= len(between):
            between.sort()  # among equals much faster than a partition
            return float(between[len(between) - rank])
        return self.low if self.at_ends and rank <= len(between) + self.at_low else None


def _select_few(values: Magnitudes, mask: npt.NDArray[np.bool_]) -> Magnitudes:
    """``values[mask]``. Among few hits numpy mispredicts every one, so eight places at a time are looked at first."""
    whole = len(values) - len(values) % 8
    eights = mask[:whole].view(np.uint64)
    hits = np.flatnonzero(eights != 0)
    near = values[:whole].reshape(-1, 8).take(hits, axis=0).reshape(-1)
    inside = near.compress(eights.take(hits).view(np.bool_))
    return inside if whole == len(values) else np.concatenate([inside, values[whole:].compress(mask[whole:])])


def _samples(operands: Sequence[Operand]) -> tuple[list[Magnitudes], bool]:
    """Each expert's magnitudes at every stride-th weight, largest first; and whether that is all of them."""
    base = operands[0]
    # Odd, so that it does not fall on the same columns of every row.
    stride = 1 if base.numel <= SAMPLE else 2 * (base.numel // SAMPLE // 2) + 1
    dtype = accumulation_dtype(base.dtype)
    # A copy, since a block lasts only until the next one.
    chosen = [
        torch.cat([block[::stride].to(dtype, copy=True) for block in operand.read(BLOCK_ELEMENTS)])
        for operand in operands
    ]
    return [np.sort((one - chosen[0]).abs_().numpy())[::-1] for one in chosen[1:]], stride == 1


def _bracket(sample: Magnitudes, rank: int, size: int) -> _Bracket:
    share = (rank - 0.5) / size
    place = share * len(sample)
    width = ceil(_DEVIATIONS * sqrt(len(sample) * share * (1 - share))) + 2
    first, last = int(place) - width, int(place) + width
    high = float(sample[first]) if first >= 0 else float("inf")
    low = float(sample[last]) if last < len(sample) else -1.0
    # Halfway to the ends of the bracket, which the rank passes once in eighty times.
    upper, lower = max(0, int(place) - width // 2), min(len(sample) - 1, int(place) + width // 2)
    return _Bracket(rank, low, high, at_ends=bool(sample[upper] == high or sample[lower] == low))
