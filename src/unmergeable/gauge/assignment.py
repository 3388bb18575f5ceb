"""The best one-to-one assignment: which column belongs to which row of a matrix of similarities.

A linear sum assignment problem, solved exactly (the Hungarian method, Kuhn 1955; here Crouse 2016 as SciPy has it). Its
cost matters at the width of a feed-forward, so the answer is read off where it can be: when the best columns of all
rows are different, no assignment can be better.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_assignment(similarity: Tensor) -> Tensor:
    """For each row the column it gets, int64 [size], so that the sum of the chosen entries is the largest.

    ``similarity`` [size, size] is finite and left as it is. Beyond it, memory is a float64 copy where SciPy is needed.
    """
    best = similarity.argmax(1)
    if len(torch.unique(best)) == len(best):
        return best
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # a second, only where needed

    _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(columns).long()
