"""Verify: do two checkpoints compute the same?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.architecture import Architecture
from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.checkpoint.source import TensorSource, require_same_tensors
from unmergeable.gauge.additive import Neutral, freedoms_of
from unmergeable.gauge.equivalence import BlockError, Equivalence, Rounded, compare
from unmergeable.network.logits import LogitGap, logit_gap
from unmergeable.ops.opened import AnyPath, open_with_architecture
from unmergeable.ops.recorded import condition_of
from unmergeable.progress import Progress, silent
from unmergeable.protections.untied import untied
from unmergeable.randomness import Stream
from unmergeable.threads import one_thread_per_kernel, worker_threads

INCONCLUSIVE = 0.25
"""Relative error of a block from which on roundings hide everything: nothing is then called equal."""


@dataclass(frozen=True)
class VerifyResult:
    """``is_equal``: every block equal up to rounding, with a bound that says something, and every other tensor equal.

    Bounds are measured: what roundings of the stored size, simulated, do to each block of these checkpoints.
    """

    architecture: str
    equivalence: Equivalence
    logits: LogitGap
    condition: float

    @property
    def is_equal(self) -> bool:
        return self.equivalence.is_equal and not self.logits.is_beyond_bound and self.undecided is None

    @property
    def undecided(self) -> BlockError | None:
        """The block that roundings alone may move furthest, where that is too far to tell anything; None elsewhere."""
        worst = max(self.equivalence.blocks, key=lambda block: block.bound, default=None)
        return worst if worst is not None and worst.error > 0 and worst.bound > INCONCLUSIVE else None

    def explain(self) -> str:
        """One clause: why they are not equal."""
        if not self.equivalence.is_equal:
            return self.equivalence.explain()
        if self.undecided is not None:
            block, bound = self.undecided.name, self.undecided.bound
            return (
                f"roundings alone may move block {block} by {bound:.2f} relative: it cannot be told at this precision"
            )
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
    expert: AnyPath,
    other: AnyPath,
    *,
    base: AnyPath | None = None,
    probe: AnyPath | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> VerifyResult:
    """Compare two checkpoints block by block, and their outputs where the networks fit in memory.

    Where the same bases do not do, activations are taken from each checkpoint's own embeddings, so that residual
    streams in different bases compare as what they compute; and then biases, gains and scales that trade with others
    (:mod:`unmergeable.gauge.additive`) are taken out of both. An output head tied in one and apart in the other is one.

    Args:
        expert, other: checkpoint folders, or ``hub:OWNER/NAME``; ``expert`` may be a LoRA folder on ``base``.
        probe: JSON lines of ``{"text": …}`` or ``{"input_ids": […]}``, or an ``.npz`` of arrays named like the
            network's inputs; random inputs when None.

    Raises:
        Mismatch: they hold other tensors, so that comparing makes no sense.
    """
    folders = folder_of(expert), folder_of(other)
    adapted = None if base is None else folder_of(base)
    stored = open_with_architecture(folders[0], base=adapted), open_with_architecture(folders[1])
    (first, architecture), (second, _) = _equally_tied(*stored)
    require_same_tensors(first, second, "comparing two checkpoints")
    condition = max(condition_of(read_manifest(folder)) for folder in folders)
    with one_thread_per_kernel():
        found = _compared(first, second, architecture, condition, worker_threads(threads), progress)
    inputs = None if probe is None else Path(probe)
    gap = logit_gap(
        stored[0][0], stored[1][0], condition, probe=inputs, is_requested=True, is_measured=True, progress=progress
    )
    return VerifyResult(architecture.family, found, gap, condition)


def _compared(
    first: TensorSource,
    second: TensorSource,
    architecture: Architecture,
    condition: float,
    threads: int,
    progress: Progress,
) -> Equivalence:
    """Compare as stored; if that is not equal, through bases of streams; and then without what biases, gains and scales
    may trade, in the neutral forms of both.
    """
    stream = Stream.from_seed(0)
    freedoms = freedoms_of(architecture, first.names)
    both: Pair = (first, second)
    rounded: Pair = (Rounded(first, stream.child("rounding.0")), Rounded(second, stream.child("rounding.1")))
    has_streams = bool(architecture.residuals)
    attempts: list[tuple[Pair, Pair, bool, frozenset[str]]] = [(both, rounded, False, frozenset())]
    if has_streams:
        attempts.append((both, rounded, True, frozenset()))
    if freedoms.tensors:
        neutral, noisy = ((Neutral(one, freedoms), Neutral(other, freedoms)) for one, other in (both, rounded))
        attempts.append((neutral, noisy, has_streams, freedoms.tensors))
    for sides, with_noise, through_streams, computed in attempts:
        found = compare(
            sides[0],
            sides[1],
            architecture,
            condition=condition,
            threads=threads,
            through_streams=through_streams,
            rounded=with_noise,
            computed=computed,
            progress=progress,
        )
        if found.is_equal:
            return found
    return found


Opened = tuple[TensorSource, Architecture]
Pair = tuple[TensorSource, TensorSource]


def _equally_tied(first: Opened, second: Opened) -> tuple[Opened, Opened]:
    """Both with the output head apart from the embedding, if one of them has it apart."""
    heads = [OUTPUT_HEAD in source.names for source, _ in (first, second)]
    if heads == [False, True] and _is_tied(first):
        return untied(*first), second
    if heads == [True, False] and _is_tied(second):
        return first, untied(*second)
    return first, second


def _is_tied(opened: Opened) -> bool:
    return any(stream.tied is not None for stream in opened[1].residuals)
