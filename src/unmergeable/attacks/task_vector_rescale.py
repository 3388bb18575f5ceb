"""task_vector_rescale: undo a shrink of the weights towards zero, and scale the task vector up.

A penalty on the norm of the weights (the first stage of MergeGuard, arXiv 2511.11851) leaves each tensor at about
(1 - c) theta_0 + tau, and the base shows by how much:

    c = 1 - <theta_p, theta_0> / ||theta_0||^2        theta = theta_0 + lambda (theta_p / (1 - c) - theta_0)

per tensor. A fine-tune is nearly orthogonal to its base, so that c is near 0 without a shrink. ``lambda`` > 1 is for
protections that shrink the task vector itself, whose factor the weights do not show: try values, on your own data.

The function changes. It does nothing against a change of basis, where theta_p has little in common with theta_0: a
tensor whose c is beyond ``largest_shrink`` either way is not believed to be shrunk, and only its task vector scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.in_memory import in_memory
from unmergeable.attacks.task_vectors import common_tensors, inner_products
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.gauge.act import compute_dtype
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class TaskVectorRescale:
    """``scaling_coefficient`` is lambda; ``largest_shrink`` the largest |c| that is undone (0 undoes none)."""

    name: ClassVar[str] = "task_vector_rescale"
    summary: ClassVar[str] = "undoes a shrink of the weights, and scales the task vector"

    scaling_coefficient: float = 1.0
    largest_shrink: float = 0.5

    def validate(self) -> None:
        """Raises UsageError unless the coefficient is a number and 0 <= largest_shrink < 1."""
        if not math.isfinite(self.scaling_coefficient):
            raise UsageError(
                f"task_vector_rescale: scaling_coefficient must be finite, not {self.scaling_coefficient}."
            )
        if not 0 <= self.largest_shrink < 1:
            raise UsageError(f"task_vector_rescale: largest_shrink must lie in [0, 1), not {self.largest_shrink}.")

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base",))

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Estimates c of every tensor of two or more dimensions that both checkpoints hold in one shape.

        Raises:
            BadInput: when one of them holds NaN or infinity.
        """
        names = [
            name
            for name in common_tensors([inputs.protected, inputs.base])
            if len(inputs.protected.spec(name).shape) >= 2
        ]
        shrinks: dict[str, float] = {}
        for done, name in enumerate(names, start=1):
            shrinks[name] = shrink(inputs.protected, inputs.base, name)
            progress("measuring", done, len(names), "tensors")
        undone = {name: c for name, c in shrinks.items() if abs(c) <= self.largest_shrink}
        edits = {name: partial(self._rescaled, inputs.base, name, undone.get(name, 0.0)) for name in names}
        average = sum(undone.values()) / len(undone) if undone else 0.0
        findings = {"mean_shrink": average, "tensors_unshrunk": len(undone), "tensors_left": len(names) - len(undone)}
        return Recovered(inputs.protected, edits, findings)

    def _rescaled(self, base: TensorSource, name: str, c: float, tensor: Tensor) -> Tensor:
        dtype = compute_dtype(tensor.dtype)
        theirs = base.tensor(name).to(dtype)
        task_vector = tensor.to(dtype) / (1 - c) - theirs
        return (theirs + self.scaling_coefficient * task_vector).to(tensor.dtype)


def shrink(checkpoint: TensorSource, base: TensorSource, name: str) -> float:
    """c of the module docstring for one tensor; 0 where the base is zero.

    Raises:
        BadInput: when one of them holds NaN or infinity.
    """
    gram = inner_products([checkpoint], base, name)
    # c = -<theta_p - theta_0, theta_0> / ||theta_0||^2: the difference of two near numbers is not taken.
    return float(-gram[0, 1] / gram[1, 1]) if gram[1, 1] > 0 else 0.0


task_vector_rescale = in_memory(TaskVectorRescale)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
