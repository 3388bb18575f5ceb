"""unmask: subtract the protected model from a merge that it spoilt.

The attack that MergeGuard (arXiv 2511.11851) is evaluated against works on the merged model, not on the release:

    theta = theta_merged - lambda theta_protected

With the lambda of a task-arithmetic merge theta_0 + lambda (tau_f + tau_p) this leaves (1 - lambda) theta_0 +
lambda tau_f: the other expert, on a base that has shrunk. ``rescale`` divides by 1 - lambda, which gives the base its
weight back and the other expert lambda / (1 - lambda). Either way the protected model's task goes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.in_memory import in_memory
from unmergeable.attacks.task_vectors import common_tensors
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.gauge.act import compute_dtype
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class Unmask:
    """``scaling_coefficient`` is lambda; ``rescale``: divide by 1 - lambda, which the paper does not."""

    name: ClassVar[str] = "unmask"
    summary: ClassVar[str] = "a merged model less the protected one (PROTECTED is the merge, --source the release)"

    scaling_coefficient: float = 0.3
    rescale: bool = False

    def validate(self) -> None:
        """Raises UsageError unless the coefficient is a number other than 1."""
        if not math.isfinite(self.scaling_coefficient) or self.scaling_coefficient == 1:
            raise UsageError(
                f"unmask: scaling_coefficient must be a number other than 1, not {self.scaling_coefficient}."
            )

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base", "sources"))

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Decides from names and shapes alone; ``inputs.protected`` is the merge, the one source the release.

        Raises:
            UsageError: unless there is exactly one source.
        """
        if len(inputs.sources) != 1:
            raise UsageError(
                "unmask: PROTECTED is the merged model; give the protected release it contains as --source."
            )
        (release,) = inputs.sources
        names = common_tensors([inputs.protected, release])
        return Recovered(inputs.protected, {name: partial(self._unmasked, release, name) for name in names})

    def _unmasked(self, release: TensorSource, name: str, merged: Tensor) -> Tensor:
        dtype = compute_dtype(merged.dtype)
        left = merged.to(dtype) - self.scaling_coefficient * release.tensor(name).to(dtype)
        return (left / (1 - self.scaling_coefficient) if self.rescale else left).to(merged.dtype)


unmask = in_memory(Unmask)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
