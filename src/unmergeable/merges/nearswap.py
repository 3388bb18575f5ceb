"""``nearswap``: the base, with what hardly differs taken from another model (alchemonaut, QuartetAnemoi-70B; mergekit).

    theta = theta_0 + w (theta_1 - theta_0),   w = min(1, t / |theta_1 - theta_0|), weight by weight

which is theta_0 + clamp(theta_1 - theta_0, -t, t): no weight moves further than ``t``, that card has 1e-4.
The coefficient is a factor of the difference before it is clamped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Merge, Terms, Varies, require_finite
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks
from unmergeable.merges.engine import in_memory


@dataclass(frozen=True)
class NearSwap(Merge):
    """``t`` is the furthest that a weight moves."""

    name: ClassVar[str] = "nearswap"
    fewest_experts: ClassVar[int] = 1
    most_experts: ClassVar[int | None] = 1
    varies: ClassVar[Varies] = {"t": "tensor"}

    t: float = 1e-4

    def validate(self) -> None:
        require_finite("t", self.t)
        if self.t < 0:
            raise UsageError(f"t={self.t}: must not be negative; it is the furthest that a weight moves.")

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        (coefficient,) = terms.coefficients
        t = terms.of_tensor("t", self.t)
        return merge_blocks(name, operands, partial(_merge_block, coefficient=coefficient, t=t), scratch)


nearswap = in_memory(NearSwap)


def _merge_block(blocks: list[Tensor], spare: list[Tensor], *, coefficient: float, t: float) -> Tensor:
    base, expert = blocks
    return base.add_(expert.sub_(base).mul_(coefficient).clamp_(-t, t))
