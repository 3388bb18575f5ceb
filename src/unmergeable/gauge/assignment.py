"""One-to-one assignments: which column belongs to which row of a matrix of similarities.

The largest sum of one entry from every row and every column is a linear sum assignment problem. Where the best columns
of all rows are different no assignment can be better, and the answer is read off. Elsewhere there are two solvers.

:func:`best_assignment` is exact (the Hungarian method, Kuhn 1955; here Crouse 2016 as SciPy has it). Recoveries use it:
they look for an order that was planted, and one that is nearly as good has wrong units in it.

:func:`nearly_best_assignment` stops at a sum that is proven to be near the largest, for those who want the sum: at the
width of a feed-forward in a twentieth of the time and without a copy of the matrix. It is Bertsekas' auction with
epsilon scaling (Annals of Operations Research 14, 1988). Columns have prices p, 0 at first:

    a row without a column takes the j with the largest  value_j = similarity_ij - p_j ;
    p_j rises by the lead of value_j over the second best, and by epsilon;
    whoever had j is without a column.

Whatever the prices, no assignment has a sum above  sum_i max_j (similarity_ij - p_j) + sum_j p_j  (weak duality): this
is the proof. When every row has a column the sum is below that by size x epsilon at most, and the prices make the next
auction, with a smaller epsilon, a short one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SCALING = 6.0
"""Between one epsilon of the auction and the next; from 4 to 15 it makes little difference."""

BIDS_PER_ROW = 100
"""What all auctions may take together. Feed-forwards take 20; 100 are a quarter of what the exact solver takes."""

Matrix = npt.NDArray[np.floating]
Prices = npt.NDArray[np.float64]
Columns = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Assignment:
    """``columns`` int64 [size], one for each row; no assignment's sum is larger by more than ``gap``."""

    columns: Tensor
    gap: float


def best_assignment(similarity: Tensor) -> Tensor:
    """For each row the column it gets, int64 [size], so that the sum of the chosen entries is the largest.

    ``similarity`` [size, size] is finite and left as it is. Beyond it, memory is a float64 copy where SciPy is needed.
    """
    best = similarity.argmax(1)
    return best if _are_different(best) else _hungarian(similarity)


def nearly_best_assignment(similarity: Tensor, *, gap: float) -> Assignment:
    """A column for each row, so that the sum of the chosen entries is the largest, or below it by ``gap`` at most.

    The same for the same matrix, on any number of threads. Where the auction finds no proof within ``BIDS_PER_ROW``
    bids per row (a gap near rounding, entries that fall off like the powers of a number) the exact solver takes over.

    Args:
        similarity: finite [size, size], left as it is.
        gap: in units of the sum. 0 asks for the exact solution, the long way.

    Memory beyond ``similarity``: a few of its rows; a float64 copy where the exact solver takes over.
    """
    best = similarity.argmax(1)
    if _are_different(best):
        return Assignment(best, 0.0)
    matrix: Matrix = similarity.numpy()
    largest = matrix.max(1)
    if np.array_equal(largest, matrix.min(1)):  # every sum is the same, and no row leads by anything
        return Assignment(torch.arange(len(matrix)), 0.0)
    # A float64 price is not too large to feel an epsilon: in float32 the auction could go round for ever.
    prices = np.zeros(len(matrix))
    # By what a row's best exceeds its mean, which a number added to a row does not alter.
    epsilon = max(float(np.mean(largest - matrix.mean(1, dtype=np.float64))), gap / len(matrix))
    bids = BIDS_PER_ROW * len(matrix)
    while True:
        columns, bids = _auction(matrix, prices, epsilon=epsilon, bids=bids)
        if columns is None:
            return Assignment(_hungarian(similarity), 0.0)
        if len(matrix) * epsilon <= SCALING * gap:  # a proof is half of that as a rule, and costs a bid per row
            proven = _proven_gap(matrix, prices, columns)
            if proven <= gap:
                return Assignment(torch.from_numpy(columns), proven)
        epsilon /= SCALING


def _are_different(columns: Tensor) -> bool:
    return len(torch.unique(columns)) == len(columns)


def _hungarian(similarity: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # a second, only where needed

    _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def _auction(matrix: Matrix, prices: Prices, *, epsilon: float, bids: int) -> tuple[Columns | None, int]:
    """A column for each row, or None when ``bids`` were too few; and the bids that are left. Raises ``prices``."""
    size = len(matrix)
    owner = np.full(size, -1, dtype=np.int64)
    columns = np.full(size, -1, dtype=np.int64)
    free, values = list(range(size)), np.empty(size)
    while free:
        if bids == 0:
            return None, 0
        bids -= 1
        row = free.pop()
        np.subtract(matrix[row], prices, out=values)
        column = int(values.argmax())
        largest = values[column]
        values[column] = -np.inf
        prices[column] += largest - values.max() + epsilon
        if owner[column] >= 0:
            free.append(int(owner[column]))
        owner[column], columns[row] = row, column
    return columns, bids


def _proven_gap(matrix: Matrix, prices: Prices, columns: Columns) -> float:
    """By what the dual bound exceeds the sum, rounding included: sums are exact, a difference is off by half an ulp."""
    largest = [float((row - prices).max()) for row in matrix]
    chosen = np.take_along_axis(matrix, columns[:, None], axis=1)[:, 0]
    rounding = float(np.finfo(np.float64).eps) * math.fsum(map(abs, largest))
    return math.fsum([*largest, *prices.tolist(), *(-chosen.astype(np.float64)).tolist(), rounding])
