"""source_subtraction: take public siblings out of a mixture with them, and scale up what is left.

The global part of the sensitivity shield (ICLR 2026 submission "Sensitivity as a Shield") releases a mixture of the
owner's expert with siblings theta_t of the same base: with task vectors tau = theta - theta_0,

    tau_p = (1 - sum_t lambda_t) tau_d + sum_t lambda_t tau_t

Task vectors of different tasks are nearly orthogonal, so least squares of tau_p on the tau_t finds the lambda_t,

    lambda = G^-1 b        G_st = <tau_s, tau_t>        b_t = <tau_t, tau_p>

over all tensors together, and (tau_p - sum_t lambda_t tau_t) / (1 - sum_t lambda_t) is the expert's task vector. The
attacker has to hold the siblings that were used; others get a lambda near 0 and do little harm. What tau_d itself has
in common with a sibling is taken out too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.in_memory import in_memory
from unmergeable.attacks.task_vectors import common_tensors, inner_products
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import Mismatch, UsageError
from unmergeable.gauge.act import compute_dtype
from unmergeable.progress import Progress, silent

LARGEST_SHARE = 0.9
"""Above this sum of coefficients next to nothing of the expert is left to be scaled up."""


@dataclass(frozen=True)
class SourceSubtraction:
    """``rescale``: also divide by what the mixture left of the expert."""

    name: ClassVar[str] = "source_subtraction"
    summary: ClassVar[str] = "takes public siblings out of a mixture with them"

    rescale: bool = True

    def validate(self) -> None:
        """Every combination of settings is valid."""

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base", "sources"))

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Finds the coefficients from all tensors that every checkpoint holds in one shape.

        Raises:
            UsageError: without sources.
            Mismatch: when the sources are not fine-tunes of the base, or the protected checkpoint is a mixture of them
                and nothing else.
            BadInput: when one of the checkpoints holds NaN or infinity.
        """
        if not inputs.sources:
            raise UsageError("source_subtraction: give the fine-tunes that may be mixed in, each with --source.")
        coefficients = mixture(inputs.protected, inputs.sources, inputs.base, progress)
        share = float(coefficients.sum())
        if share > LARGEST_SHARE:
            raise Mismatch(
                f"{inputs.protected.description} is a mixture of the given sources to {share:.0%}: nothing of its own "
                "is left to recover; is one of the sources the checkpoint itself?"
            )
        factor = 1 / (1 - share) if self.rescale else 1.0
        every = [inputs.protected, inputs.base, *inputs.sources]
        edits = {
            name: partial(_without, inputs.base, inputs.sources, coefficients.tolist(), factor, name)
            for name in common_tensors(every)
        }
        findings = {
            f"coefficient of {source.description}": float(value)
            for source, value in zip(inputs.sources, coefficients, strict=True)
        }
        return Recovered(inputs.protected, edits, {**findings, "rescaled_by": factor})


def mixture(
    checkpoint: TensorSource, sources: Sequence[TensorSource], base: TensorSource, progress: Progress = silent
) -> Tensor:
    """The coefficients lambda of the module docstring, float64, one per source.

    Raises:
        Mismatch: when no tensor is common to all, or the sources' task vectors depend on each other.
        BadInput: when one of the checkpoints holds NaN or infinity.
    """
    names = common_tensors([checkpoint, base, *sources])
    gram = torch.zeros(len(sources) + 2, len(sources) + 2, dtype=torch.float64)
    for done, name in enumerate(names, start=1):
        gram += inner_products([checkpoint, *sources], base, name)
        progress("measuring", done, len(names), "tensors")
    between, with_checkpoint = gram[1:-1, 1:-1], gram[1:-1, 0]
    # Two copies of one fine-tune, or the base itself, leave their coefficients undetermined.
    if not names or torch.linalg.matrix_rank(between, hermitian=True) < len(sources):
        raise Mismatch(
            "the sources are not different fine-tunes of this base: give each once, in the base's architecture."
        )
    coefficients: Tensor = torch.linalg.solve(between, with_checkpoint)
    return coefficients


def _without(
    base: TensorSource,
    sources: Sequence[TensorSource],
    coefficients: Sequence[float],
    factor: float,
    name: str,
    tensor: Tensor,
) -> Tensor:
    dtype = compute_dtype(tensor.dtype)
    theirs = base.tensor(name).to(dtype)
    task_vector = tensor.to(dtype) - theirs
    for source, coefficient in zip(sources, coefficients, strict=True):
        task_vector -= coefficient * (source.tensor(name).to(dtype) - theirs)
    return (theirs + factor * task_vector).to(tensor.dtype)


source_subtraction = in_memory(SourceSubtraction)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
