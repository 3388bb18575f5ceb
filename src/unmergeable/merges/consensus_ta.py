"""``consensus_ta``: task arithmetic on the weights that several tasks use (TALL-masks, arXiv 2405.07813).

With tau_i = c_i (theta_i - theta_0) and tau = sum_i tau_i, task i uses weight p where

    |tau_i[p]| >= mask_threshold * |tau[p] - tau_i[p]|

Weights used by one task alone ("selfish") or by none ("catastrophic") are left at the base:

    theta = theta_0 + scaling_coefficient * m * tau,    m = 1 where at least ``agreement`` tasks use the weight

``agreement`` 2 is the paper's. It chooses the threshold per task from 0.2 to 0.6, and the scaling, on validation data;
without data the defaults are the middle of that range and the 0.3 of task arithmetic. mergekit has no such method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies, require_finite
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks
from unmergeable.merges.engine import in_memory


@dataclass(frozen=True)
class ConsensusTa(Merge):
    """``mask_threshold`` may differ from expert to expert, as in the paper."""

    name: ClassVar[str] = "consensus_ta"
    varies: ClassVar[Varies] = {"mask_threshold": "expert", "scaling_coefficient": "tensor"}

    scaling_coefficient: float = 0.3
    mask_threshold: float = 0.4
    agreement: int = 2

    def validate(self) -> None:
        require_finite("scaling_coefficient", self.scaling_coefficient)
        require_finite("mask_threshold", self.mask_threshold)
        if self.mask_threshold < 0:
            raise UsageError(f"mask_threshold={self.mask_threshold}: must not be negative.")
        if self.agreement < 0:
            raise UsageError(f"agreement={self.agreement}: must not be negative; 0 keeps every weight.")

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        kernel = partial(
            _merge_block,
            coefficients=terms.coefficients,
            scaling_coefficient=terms.of_tensor("scaling_coefficient", self.scaling_coefficient),
            mask_thresholds=terms.per_expert("mask_threshold", self.mask_threshold),
            agreement=self.agreement,
        )
        return merge_blocks(name, operands, kernel, scratch, spare=3)


consensus_ta = in_memory(ConsensusTa)


def _merge_block(
    blocks: list[Tensor],
    spare: list[Tensor],
    *,
    coefficients: Sequence[float],
    scaling_coefficient: float,
    mask_thresholds: Sequence[float],
    agreement: int,
) -> Tensor:
    base, *experts = blocks
    total, users, rest = spare
    total.zero_()
    users.zero_()
    for expert, coefficient in zip(experts, coefficients, strict=True):
        total.add_(expert.sub_(base).mul_(coefficient))
    for task_vector, mask_threshold in zip(experts, mask_thresholds, strict=True):
        torch.sub(total, task_vector, out=rest).abs_().mul_(mask_threshold)
        users.add_(torch.ge(task_vector.abs_(), rest, out=rest))
    kept = torch.ge(users, agreement, out=rest)
    return base.add_(total.mul_(kept), alpha=scaling_coefficient)
