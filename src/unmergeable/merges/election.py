"""The second half of TIES, which several merges share: elect a sign per weight, then average those who agree.

With t_i the trimmed or thinned task vectors and c_i their coefficients, per weight:

    elect     s = sign(sum_i c_i t_i)
    merge     tau = sum of c_i t_i over the experts with sign(t_i) = s, divided as ``average`` says

Where implementations differ, both exist:

=============  ==========================================================  =======================================
setting        TIES-Merging (arXiv 2306.01708)                             mergekit
=============  ==========================================================  =======================================
``average``    ``count``: divide by the number of experts that agree       ``weight``: by the sum of their c_i
                                                                           (``sum`` for normalize: false)
``undecided``  ``drop``: a mass of exactly 0 elects nobody                 ``positive``: it elects +
=============  ==========================================================  =======================================
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmergeable.merges.blocks import accumulation_dtype
from unmergeable.merges.magnitudes import largest_below

Average = Literal["count", "weight", "sum"]
Undecided = Literal["drop", "positive"]

SPARE = 2
"""Buffers that :meth:`Election.add` needs."""


@dataclass(frozen=True)
class Election:
    """The settings of one tensor: the c_i, the factor of the merged task vector, and those of the table above."""

    coefficients: Sequence[float]
    scaling_coefficient: float
    average: Average
    undecided: Undecided

    def add(self, base: Tensor, weighted: Sequence[Tensor], spare: Sequence[Tensor]) -> Tensor:
        """``base + scaling_coefficient * tau``, in the memory of ``base``. Overwrites all it is given.

        Args:
            base: one block of the base.
            weighted: the same block of the task vectors, already times their coefficients.
            spare: ``SPARE`` buffers.
        """
        elected, total = spare
        _add_up(weighted, out=elected)
        if self.undecided == "positive":
            elected.ge_(0).mul_(2).sub_(1)
        else:
            elected.sign_()

        # Masks and selections are slow on the CPU. Multiplied by the elected sign, those that agree are positive.
        magnitudes = [task_vector.mul_(elected).relu_() for task_vector in weighted]
        _add_up(magnitudes, out=total)
        if self.average != "sum":
            shares = self.coefficients if self.average == "weight" else [1.0] * len(weighted)
            first, *others = (magnitude.gt_(0) for magnitude in magnitudes)
            agreeing = first.mul_(shares[0])
            for vote, share in zip(others, shares[1:], strict=True):
                agreeing.add_(vote, alpha=share)
            # Where nobody agrees the total is 0 too, and 0 / tiny = 0.
            total.div_(agreeing.clamp_min_(torch.finfo(agreeing.dtype).tiny))
        return base.addcmul_(total, elected, value=self.scaling_coefficient)


def _add_up(tensors: Sequence[Tensor], *, out: Tensor) -> None:
    """The sum, left to right; the first addition needs no copy of the first tensor."""
    if len(tensors) == 1:
        out.copy_(tensors[0])
        return
    torch.add(tensors[0], tensors[1], out=out)
    for tensor in tensors[2:]:
        out.add_(tensor)


def keep_elected(task_vectors: Sequence[Tensor], elected: Tensor, thresholds: Sequence[float]) -> None:
    """Trim task vectors in place below their thresholds, then zero what has not the sign of their sum.

    ``elected`` is a buffer of the same size.
    """
    for task_vector, threshold in zip(task_vectors, thresholds, strict=True):
        # hardshrink keeps what is strictly larger than its argument.
        cut = largest_below(threshold, accumulation_dtype(task_vector.dtype))
        if cut is not None:
            torch.hardshrink(task_vector, cut, out=task_vector)
    elected.copy_(task_vectors[0])
    for task_vector in task_vectors[1:]:
        elected.add_(task_vector)
    elected.sign_()
    for task_vector in task_vectors:
        # Times the sign, what agrees is positive; times the sign again, it is itself.
        task_vector.mul_(elected).relu_().mul_(elected)
