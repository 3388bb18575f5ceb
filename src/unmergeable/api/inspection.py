"""Inspect: what a checkpoint is, which symmetries it has, whether it fits a base, whether it was protected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.api.opened import open_base, open_with_architecture
from unmergeable.api.protection import describe_groups
from unmergeable.architecture import Architecture
from unmergeable.checkpoint.manifest import Manifest, read_manifest
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.equivalence import UNIT_ROUNDOFF
from unmergeable.progress import Progress, silent
from unmergeable.recoveries import Fit, NearestOrbit
from unmergeable.recoveries.distance import Distance, block_distances, relative_distance

UNRELATED = 0.7
"""Relative distance from which a base is not believed: independent weights of equal norm are sqrt(2) apart."""

REBASED = 3.0
"""How many times nearer the base the best change of basis must bring the attention weights to be called a sign."""

GROUP = 128
"""Weights that share a scale in the usual 4-bit formats."""


@dataclass(frozen=True)
class BaseComparison:
    """Distances to the base, per part of a block: ``raw`` as stored, ``canonical`` after the best change of basis.

    ``feed_forward``: relative distance of the tensors no attention symmetry touches.
    """

    folder: Path
    fits: tuple[Fit, ...]
    feed_forward: float
    raw: float
    canonical: float

    @property
    def is_plausible(self) -> bool:
        """Whether this can be the base: near it in some basis."""
        return self.canonical < UNRELATED and not self.feed_forward >= UNRELATED

    @property
    def is_rebased(self) -> bool:
        """Whether the attention weights are in another basis than the base's."""
        return self.is_plausible and self.raw > REBASED * self.canonical and self.raw > 0.1

    def to_json(self) -> dict[str, Any]:
        return {
            "base": str(self.folder),
            "plausible_fine_tune": self.is_plausible,
            "attention_distance_raw": self.raw,
            "attention_distance_canonical": self.canonical,
            "feed_forward_distance": None if math.isnan(self.feed_forward) else self.feed_forward,
            "blocks": [
                {
                    "block": fit.before.block,
                    "part": fit.before.part,
                    "raw": fit.before.relative,
                    "canonical": fit.after.relative,
                }
                for fit in self.fits
            ],
        }


@dataclass(frozen=True)
class InspectResult:
    """``errors``: relative error of the attention weights under rounding to each format, measured as it is."""

    checkpoint: Path
    model_type: str
    tensors: int
    parameters: int
    nbytes: int
    shards: int
    dtypes: Mapping[str, int]
    blocks: int
    groups: Mapping[str, str]
    errors: Mapping[str, float]
    manifest: Manifest | None
    comparison: BaseComparison | None
    left_out: tuple[tuple[str, str], ...]

    @property
    def verdict(self) -> str:
        """One sentence: protected or not, and how one can tell."""
        kind = self.manifest.details.get("kind") if self.manifest else None
        if kind is not None:
            steps = (self.manifest.details.get("recipe") or {}).get("steps", []) if self.manifest else []
            by = f" by {', '.join(step['method'] for step in steps)}" if steps else ""
            return f"its unmergeable.json says: {kind}{by}."
        if self.comparison is None:
            return "no unmergeable.json; give --base to look for the signs of a protection in the weights."
        if not self.comparison.is_plausible:
            return "it is not near this base in any basis: another base, or trained far away from it."
        if self.comparison.is_rebased:
            return (
                f"attention weights are in another basis than the base's: distance {self.comparison.raw:.2f} as "
                f"stored, {self.comparison.canonical:.2f} after the best change of basis. It looks protected, and can "
                "be undone."
            )
        return "no sign of a protection: its attention weights are in the base's own basis."

    def to_json(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self.checkpoint),
            "model_type": self.model_type,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "shards": self.shards,
            "dtypes": dict(self.dtypes),
            "blocks": self.blocks,
            "symmetries": dict(self.groups),
            "relative_error_of_storing_as": dict(self.errors),
            "verdict": self.verdict,
            "manifest": dict(self.manifest.details) if self.manifest else None,
            "base": self.comparison.to_json() if self.comparison else None,
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }


def inspect(checkpoint: Path, *, base: Path | None = None, progress: Progress = silent) -> InspectResult:
    """Describe a checkpoint from its weights; with a base, compare the two.

    Raises:
        CheckpointError, UnsupportedArchitecture: it cannot be read, or there is no map for it.
        Mismatch: ``base`` is another network.
    """
    source, architecture = open_with_architecture(checkpoint, base=base)
    comparison = None
    if base is not None:
        comparison = _compare(source, open_base(base, source, architecture), architecture, base, progress)
    specs = [source.spec(name) for name in source.names]
    return InspectResult(
        checkpoint=checkpoint,
        model_type=architecture.family,
        tensors=len(specs),
        parameters=sum(spec.numel for spec in specs),
        nbytes=sum(spec.nbytes for spec in specs),
        shards=len(source.index.shards),
        dtypes={dtype: sum(spec.dtype == dtype for spec in specs) for dtype in sorted({spec.dtype for spec in specs})},
        blocks=len(architecture.blocks),
        groups=describe_groups(architecture),
        errors=storage_errors(source, architecture),
        manifest=read_manifest(checkpoint),
        comparison=comparison,
        left_out=tuple((item.name, item.reason) for item in source.index.left_out),
    )


def _compare(
    source: TensorSource, base: TensorSource, architecture: Architecture, folder: Path, progress: Progress
) -> BaseComparison:
    estimate = NearestOrbit().estimate(source, base, architecture, progress=progress)
    distances = block_distances(source, base, architecture, progress=progress)
    feed_forward: list[Distance] = [distance for distance in distances if distance.part == "feed_forward"]
    return BaseComparison(
        folder=folder,
        fits=estimate.fits,
        feed_forward=relative_distance(feed_forward) if feed_forward else math.nan,
        raw=estimate.before,
        canonical=estimate.after,
    )


def storage_errors(source: TensorSource, architecture: Architecture) -> dict[str, float]:
    """Relative Frobenius error of rounding attention weights to half precision and to 8 and 4 bits.

    Measured on the first, middle and last attention block. 8 bits: one scale per output row; 4 bits: one per
    ``GROUP`` weights of a row; both symmetric, to nearest. An ill-conditioned change of basis shows here.
    """
    attentions = architecture.attentions
    if not attentions:
        return {}
    chosen = {attentions[index].name: attentions[index] for index in (0, len(attentions) // 2, -1)}
    squares = dict.fromkeys(("bfloat16", "float16", "int8_per_row", "int4_group_128"), 0.0)
    norm = 0.0
    for block in chosen.values():
        for name in dict.fromkeys([block.parts[0].query.weight, block.value.weight, block.output.weight]):
            if source.spec(name).dtype not in UNIT_ROUNDOFF:
                continue
            weight = source.tensor(name).float()
            weight = weight if _rows_are_outputs(name, architecture) else weight.T
            norm += float(weight.double().square().sum())
            for kind, stored in _rounded(weight):
                squares[kind] += float((stored - weight).double().square().sum())
    return {kind: math.sqrt(total / norm) if norm else 0.0 for kind, total in squares.items()}


def _rows_are_outputs(name: str, architecture: Architecture) -> bool:
    """False for GPT-2's transposed storage, where the head axis of a query projection is the second."""
    for block in architecture.attentions:
        if name in (block.parts[0].query.weight, block.value.weight):
            return block.value.axis == 0
        if name == block.output.weight:
            return block.output.axis == 1
    return True


def _rounded(weight: Tensor) -> Sequence[tuple[str, Tensor]]:
    grouped = weight
    if weight.shape[1] % GROUP == 0:
        grouped = weight.reshape(-1, GROUP)
    return (
        ("bfloat16", weight.bfloat16().float()),
        ("float16", weight.half().float()),
        ("int8_per_row", _to_integers(weight, 127)),
        ("int4_group_128", _to_integers(grouped, 7).reshape(weight.shape)),
    )


def _to_integers(weight: Tensor, largest: int) -> Tensor:
    """Rounded to ``largest`` steps on either side of zero, one scale per row."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / largest
    return (weight / scale).round() * scale
