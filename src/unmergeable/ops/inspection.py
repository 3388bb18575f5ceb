"""Inspect: what a checkpoint is, which symmetries it has, whether it fits a base, whether it was protected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.attacks import Estimate, Fit, NearestOrbit
from unmergeable.attacks.distance import relative_distance
from unmergeable.attacks.signs import Sign, find_signs, halves, is_near, structure_signs
from unmergeable.checkpoint.manifest import Manifest, read_manifest
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UnsupportedArchitecture, UsageError
from unmergeable.gauge.equivalence import UNIT_ROUNDOFF
from unmergeable.ops.exact import describe_groups
from unmergeable.ops.opened import RenamedSource, open_base, open_with_architecture
from unmergeable.polynomials.layout import SECTION, names_on_disk
from unmergeable.progress import Progress, silent

GROUP = 128
"""Weights that share a scale in the usual 4-bit formats."""

Half = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class BaseComparison:
    """What the base tells: distances of every part of a block, and signs of a protection.

    ``estimate`` is that of ``nearest_orbit``; None where the structure differs, and nothing can be compared.
    """

    folder: Path
    estimate: Estimate | None
    signs: tuple[Sign, ...]

    @property
    def fits(self) -> tuple[Fit, ...]:
        """Of every part of a block; none without an estimate."""
        return () if self.estimate is None else self.estimate.fits

    @property
    def is_plausible(self) -> bool:
        """Whether this can be the base: near it in some basis."""
        return bool(self.signs) or is_near(self.fits)

    def distance(self, half: Half, side: Literal["before", "after"]) -> float | None:
        """Relative distance over all attention or all feed-forwards; None where there are none."""
        fits = halves(self.fits)[half == "feed_forward"]
        return relative_distance(getattr(fit, side) for fit in fits) if fits else None

    def to_json(self) -> dict[str, Any]:
        return {
            "base": str(self.folder),
            "plausible_fine_tune": self.is_plausible,
            "attention_distance_raw": self.distance("attention", "before"),
            "attention_distance_canonical": self.distance("attention", "after"),
            "feed_forward_distance_raw": self.distance("feed_forward", "before"),
            "feed_forward_distance_canonical": self.distance("feed_forward", "after"),
            "signs": [{"name": sign.name, "evidence": sign.evidence, "recovery": sign.recovery} for sign in self.signs],
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
        if not self.comparison.signs:
            return "no sign of a protection: its weights are in the base's own basis, and none looks edited."
        names = ", ".join(dict.fromkeys(sign.name for sign in self.comparison.signs))
        recoveries = [sign.recovery for sign in self.comparison.signs if sign.recovery]
        undone = f"`recover --method {recoveries[0]}` undoes it" if recoveries else "no recovery here undoes it"
        return f"it looks protected ({names}); {undone}."

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


def inspect(
    checkpoint: Path, *, base: Path | None = None, sources: Sequence[Path] = (), progress: Progress = silent
) -> InspectResult:
    """Describe a checkpoint from its weights; with a base, compare the two and look for signs of a protection.

    Args:
        checkpoint: a folder, or a LoRA folder with its base.
        base: what it may have been fine-tuned from.
        sources: public fine-tunes of the base that may be mixed into it.
        progress: told of parts and tensors looked at.

    Raises:
        CheckpointError, UnsupportedArchitecture: it cannot be read, or there is no map for it (a protection that
            replaced feed-forwards is recognised with the base).
        Mismatch: ``base`` is another network.
        UsageError: sources without a base.
    """
    if sources and base is None:
        raise UsageError("inspect: a source is compared with the base; give --base too.")
    try:
        source, architecture = open_with_architecture(checkpoint, base=base)
    except UnsupportedArchitecture as error:
        if base is None:
            raise
        source, architecture, signs = _restructured(checkpoint, base, error)
        comparison: BaseComparison | None = BaseComparison(base, None, signs)
        groups, errors = {}, {}
    else:
        comparison = None if base is None else _compare(source, architecture, base, sources, progress)
        groups, errors = describe_groups(architecture), storage_errors(source, architecture)
    specs = [source.spec(name) for name in source.names]
    return InspectResult(
        checkpoint=checkpoint,
        model_type=str(source.config.get("model_type") or architecture.family),
        tensors=len(specs),
        parameters=sum(spec.numel for spec in specs),
        nbytes=sum(spec.nbytes for spec in specs),
        shards=len(source.index.shards),
        dtypes={dtype: sum(spec.dtype == dtype for spec in specs) for dtype in sorted({spec.dtype for spec in specs})},
        blocks=len(architecture.blocks),
        groups=groups,
        errors=errors,
        manifest=read_manifest(checkpoint),
        comparison=comparison,
        left_out=tuple((item.name, item.reason) for item in source.index.left_out),
    )


def _compare(
    source: TensorSource, architecture: Architecture, base: Path, sources: Sequence[Path], progress: Progress
) -> BaseComparison:
    base_source = open_base(base, source, architecture)
    estimate = NearestOrbit().estimate(source, base_source, architecture, progress=progress)
    tuned = [open_checkpoint(folder, base=base) for folder in sources]
    signs = find_signs(source, base_source, architecture, estimate, tuned, progress)
    return BaseComparison(base, estimate, signs)


def _restructured(
    checkpoint: Path, base: Path, error: UnsupportedArchitecture
) -> tuple[TensorSource, Architecture, tuple[Sign, ...]]:
    """A checkpoint of no known family whose feed-forwards are not the base's; ``error`` where that is not it."""
    source = open_checkpoint(checkpoint)
    base_source, architecture = open_with_architecture(base)
    signs = structure_signs(under_original_names(source), base_source, architecture)
    if not signs:
        raise error
    return source, architecture, tuple(signs)


def under_original_names(source: TensorSource) -> TensorSource:
    """A network of polynomials by the names that the files of its family use; its own are those of the modules."""
    if SECTION not in source.config:
        return source
    return RenamedSource(source, names_on_disk(source.config, source.description, source.names))


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
        for name in dict.fromkeys([*_query(block), block.value.weight, block.output.weight]):
            if source.spec(name).dtype not in UNIT_ROUNDOFF:
                continue
            weight = source.tensor(name).float()
            weight = weight if _rows_are_outputs(name, architecture) else weight.T
            norm += float(weight.double().square().sum())
            for kind, stored in _rounded(weight):
                squares[kind] += float((stored - weight).double().square().sum())
    return {kind: math.sqrt(total / norm) if norm else 0.0 for kind, total in squares.items()}


def _query(block: Attention) -> list[str]:
    return [part.query.weight for part in block.parts[:1]]  # none where queries and keys are left alone


def _rows_are_outputs(name: str, architecture: Architecture) -> bool:
    """False for GPT-2's transposed storage, where the head axis of a query projection is the second."""
    for block in architecture.attentions:
        if name in (*_query(block), block.value.weight):
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
