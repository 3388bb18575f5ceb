"""Verify: do two checkpoints compute the same?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.api.logits import LogitGap, logit_gap
from unmergeable.api.opened import open_with_architecture
from unmergeable.api.workers import one_thread_per_kernel, worker_threads
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.checkpoint.source import require_same_tensors
from unmergeable.gauge.equivalence import Equivalence, compare
from unmergeable.progress import Progress, silent

CONDITION_WITHOUT_MANIFEST = 4.0
"""The default of the protections here: what rounding may explain when neither folder says how it was made."""


@dataclass(frozen=True)
class VerifyResult:
    """``is_equal``: every block equal up to rounding and every other tensor equal."""

    architecture: str
    equivalence: Equivalence
    logits: LogitGap
    condition: float

    @property
    def is_equal(self) -> bool:
        return self.equivalence.is_equal and not self.logits.is_beyond_bound

    def explain(self) -> str:
        """One clause: why they are not equal."""
        if not self.equivalence.is_equal:
            return self.equivalence.explain()
        return f"outputs move by {self.logits.gap:.2e}, rounding explains {self.logits.bound:.2e}"

    def to_json(self) -> dict[str, Any]:
        worst = self.equivalence.worst
        return {
            "equal": self.is_equal,
            "reason": None if self.is_equal else self.explain(),
            "architecture": self.architecture,
            "condition": self.condition,
            "blocks": [
                {"name": block.name, "error": block.error, "bound": block.bound} for block in self.equivalence.blocks
            ],
            "worst_block": worst.name if worst else None,
            "altered_tensors": list(self.equivalence.altered),
            "logits": self.logits.to_json(),
        }


def verify(
    expert: Path,
    other: Path,
    *,
    base: Path | None = None,
    probe: Path | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> VerifyResult:
    """Compare two checkpoints block by block, and their outputs where the networks fit in memory.

    Args:
        expert, other: checkpoint folders; ``expert`` may be a LoRA folder on ``base``.
        probe: JSON lines of ``{"text": …}`` or ``{"input_ids": […]}``, or an ``.npz`` of arrays named like the
            network's inputs; random inputs when None.

    Raises:
        Mismatch: they hold other tensors, so that comparing makes no sense.
    """
    first, architecture = open_with_architecture(expert, base=base)
    second, _ = open_with_architecture(other)
    require_same_tensors(first, second, "comparing two checkpoints")
    condition = max(_condition(expert), _condition(other))
    with one_thread_per_kernel():
        found = compare(
            first, second, architecture, condition=condition, threads=worker_threads(threads), progress=progress
        )
    gap = logit_gap(first, second, condition, probe=probe, is_requested=True, progress=progress)
    return VerifyResult(architecture.family, found, gap, condition)


def _condition(folder: Path) -> float:
    manifest = read_manifest(folder)
    return (
        float(manifest.details.get("condition_bound", CONDITION_WITHOUT_MANIFEST))
        if manifest
        else CONDITION_WITHOUT_MANIFEST
    )
