"""``ram``: what one expert alone changed is kept whole, what several changed is averaged (arXiv 2601.13572, RAM).

With tau_i = theta_i - theta_0, weight by weight, and n the number of experts with |tau_i| > ``threshold``:

    theta = theta_0 + sum_i lambda_i tau_i [|tau_i| > threshold] / max(1, n)

Where experts overlap, their skills are diluted. ``amplify`` makes up for it (RAM+): what expert i alone changed is
multiplied by 1 + ``amplify`` min(rho_i, ``most``), rho_i being the number of weights it shares over the number it has
for itself, counted within each tensor, as mergekit's ``ramplus_tl`` does (with 0.1 and 0.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, widened_blocks
from unmergeable.merges.engine import in_memory


@dataclass(frozen=True)
class Ram(Merge):
    """``threshold``: a smaller change counts as none."""

    name: ClassVar[str] = "ram"
    fewest_experts: ClassVar[int] = 1
    varies: ClassVar[Varies] = {"threshold": "tensor", "amplify": "tensor", "most": "tensor"}

    threshold: float = 1e-5
    amplify: float = 0.0
    most: float = 0.2

    def validate(self) -> None:
        for name in ("threshold", "amplify", "most"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name}={getattr(self, name)}: must not be negative, nor infinite.")

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        threshold = terms.of_tensor("threshold", self.threshold)
        amplify, most = terms.of_tensor("amplify", self.amplify), terms.of_tensor("most", self.most)
        alone = [1.0] * (len(operands) - 1)
        if amplify:
            shared, own = _counts(operands, threshold, scratch)
            alone = [1 + amplify * min(most, s / max(1, o)) for s, o in zip(shared, own, strict=True)]
        kernel = partial(_merge_block, coefficients=terms.coefficients, threshold=threshold, alone=alone)
        return merge_blocks(name, operands, kernel, scratch, spare=2)


ram = in_memory(Ram)


def _counts(operands: Sequence[Operand], threshold: float, scratch: Scratch) -> tuple[list[int], list[int]]:
    """Per expert, how many weights it changed together with another, and how many alone."""
    shared, own = [0] * (len(operands) - 1), [0] * (len(operands) - 1)
    for blocks, (counts, _) in widened_blocks(operands, scratch, spare=2):
        changes = _changed(blocks, threshold, counts)
        for number, change in enumerate(changes):
            has_changed = change != 0
            alone = int((has_changed & (counts == 1)).sum())
            own[number] += alone
            shared[number] += int(has_changed.sum()) - alone
    return shared, own


def _changed(blocks: list[Tensor], threshold: float, counts: Tensor) -> list[Tensor]:
    """The task vectors without what is too small, in the experts' memory; ``counts`` says how many changed a weight."""
    base, *experts = blocks
    counts.zero_()
    for expert in experts:
        # hardshrink keeps what is strictly larger than its argument.
        torch.hardshrink(expert.sub_(base), threshold, out=expert)
        counts.add_(expert != 0)
    return experts


def _merge_block(
    blocks: list[Tensor],
    spare: list[Tensor],
    *,
    coefficients: Sequence[float],
    threshold: float,
    alone: Sequence[float],
) -> Tensor:
    counts, factor = spare
    changes = _changed(blocks, threshold, counts)
    for change, coefficient, amplified in zip(changes, coefficients, alone, strict=True):
        if amplified == 1:
            change.div_(counts.clamp(min=1))
        else:
            torch.reciprocal(counts.clamp(min=1), out=factor)
            change.mul_(factor.masked_fill_(counts == 1, amplified))
        blocks[0].add_(change, alpha=coefficient)
    return blocks[0]
