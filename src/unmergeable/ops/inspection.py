"""Inspect: what a checkpoint is, which symmetries it has, whether it fits a base, whether it was protected."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.attacks import Estimate, Fit, Inputs, NearestOrbit
from unmergeable.attacks.distance import relative_distance
from unmergeable.attacks.prepared import prepared
from unmergeable.attacks.signs import Sign, find_signs, halves, hidden_signs, idle_structure, is_near, structure_signs
from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.manifest import Manifest, read_manifest
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import Mismatch, UnsupportedArchitecture, UsageError, shown
from unmergeable.gauge.equivalence import UNIT_ROUNDOFF
from unmergeable.ops.opened import architecture_of, in_words_of_base, open_base, open_with_architecture
from unmergeable.ops.recorded import methods_of
from unmergeable.polynomials.layout import under_names_on_disk
from unmergeable.progress import Progress, silent
from unmergeable.protections.exact import describe_groups

GROUP = 128
"""Weights that share a scale in the usual 4-bit formats."""

Half = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class BaseComparison:
    """A checkpoint against a base: the distance of every part of a block, and signs of a protection.

    ``estimate`` is that of ``nearest_orbit``; None where the structure differs, and distances mean nothing.
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

    def lines(self) -> list[str]:
        """Distances as stored, which depend on the basis, beside those in the nearest one, which do not; the signs."""
        signs = [f"Sign of {sign.name}: {sign.evidence}" for sign in self.signs]
        if not self.fits:
            return signs
        names = [(fit.before.block, fit.before.part) for fit in self.fits]
        blocks, parts = (max(len(name[place]) for name in names) for place in (0, 1))
        lines = [f"Relative distance to {self.folder}, as stored and after the best change of basis:"]
        halves: tuple[tuple[str, Half], ...] = (("all attention", "attention"), ("all feed-forwards", "feed_forward"))
        for title, half in halves:
            stored, nearest = self.distance(half, "before"), self.distance(half, "after")
            if stored is not None:
                lines.append(f"  {title:<{blocks + parts + 2}}  {stored:8.4f}  {nearest:8.4f}")
        for (block, part), fit in zip(names, self.fits, strict=True):
            distances = f"{fit.before.relative:8.4f}  {fit.after.relative:8.4f}"
            lines.append(f"  {block:<{blocks}}  {part:<{parts}}  {distances}")
        return lines + signs

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
    """What a checkpoint is.

    Attributes:
        checkpoint: its folder.
        model_type: of its config, or the family whose symmetry map fits it.
        tensors, parameters, nbytes, shards: how many there are of each.
        dtypes: how many tensors have each dtype.
        blocks: how many blocks (attention or feed-forward) the symmetry map has.
        groups: for each role, the changes of basis that keep the function; empty where the structure is unknown.
        errors: relative Frobenius error of the attention weights when rounded to each format.
        manifest: its ``unmergeable.json``, if there is one.
        comparison: with the base, if one was given.
        left_out: names of files that a protected copy would leave out, each with the reason.
        notes: what was put right on reading: names of a wrapper, settings that do not describe these weights.
    """

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
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One sentence: protected or not, and how one can tell."""
        kind = self.manifest.details.get("kind") if self.manifest else None
        if kind is not None:
            methods = methods_of(self.manifest.details) if self.manifest else ()
            by = f" by {', '.join(methods)}" if methods else ""
            return f"its unmergeable.json says: {shown(kind)[1:-1] if isinstance(kind, str) else shown(kind)}{by}."
        if self.comparison is None:
            return "no unmergeable.json; give --base to look for the signs of a protection in the weights."
        if not self.comparison.is_plausible:
            return "it is not near this base in any basis: another base, or trained far away from it."
        if not self.comparison.signs:
            return "no sign of a protection: its weights are in the base's own basis, and none looks edited."
        names = ", ".join(dict.fromkeys(sign.name for sign in self.comparison.signs))
        recoveries = [sign.recovery for sign in self.comparison.signs if sign.recovery]
        undone = f"`recover --method {recoveries[0]}` undoes it" if recoveries else "no attack here undoes it"
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
            "notes": list(self.notes),
        }


def inspect(
    checkpoint: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    sources: Sequence[str | os.PathLike[str]] = (),
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> InspectResult:
    """Describe a checkpoint from its weights; with a base, compare the two and look for signs of a protection.

    Checkpoints are folders, or ``hub:OWNER/NAME``.

    Args:
        checkpoint: a checkpoint, or a LoRA folder with its base.
        base: what it may have been fine-tuned from.
        sources: public fine-tunes of the base that may be mixed into it.
        allow_pickle: read checkpoints that have no safetensors files.
        progress: called with the parts and tensors looked at.

    Raises:
        CheckpointError, UnsupportedArchitecture: it cannot be read, or there is no map for it (a protection that
            replaced feed-forwards is recognised with the base).
        Mismatch: ``base`` is another network.
        UsageError: sources without a base.
    """
    if sources and base is None:
        raise UsageError("inspect: a source is compared with the base; give --base too.")
    folder = folder_of(checkpoint)
    base = None if base is None else folder_of(base)
    try:
        source, architecture = open_with_architecture(folder, base=base, allow_pickle=allow_pickle)
    except UnsupportedArchitecture as error:
        if base is None:
            raise
        source, architecture, signs = _restructured(folder, base, error, allow_pickle=allow_pickle)
        comparison: BaseComparison | None = BaseComparison(base, None, signs)
        groups, errors = {}, {}
    else:
        others = (
            []
            if base is None
            else [open_checkpoint(folder_of(other), base=base, allow_pickle=allow_pickle) for other in sources]
        )
        comparison = (
            None if base is None else _compare(source, architecture, base, others, progress, allow_pickle=allow_pickle)
        )
        groups, errors = describe_groups(architecture), storage_errors(source, architecture)
    specs = [source.spec(name) for name in source.names]
    return InspectResult(
        checkpoint=folder,
        model_type=str(source.config.get("model_type") or architecture.family),
        tensors=len(specs),
        parameters=sum(spec.numel for spec in specs),
        nbytes=sum(spec.nbytes for spec in specs),
        shards=len(source.index.shards),
        dtypes={dtype: sum(spec.dtype == dtype for spec in specs) for dtype in sorted({spec.dtype for spec in specs})},
        blocks=len(architecture.blocks),
        groups=groups,
        errors=errors,
        manifest=read_manifest(folder),
        comparison=comparison,
        left_out=tuple((item.name, item.reason) for item in source.index.left_out),
        notes=source.index.notes,
    )


def _compare(
    source: TensorSource,
    architecture: Architecture,
    base: Path,
    sources: Sequence[TensorSource],
    progress: Progress,
    *,
    allow_pickle: bool,
) -> BaseComparison:
    source = in_words_of_base(base, source, allow_pickle=allow_pickle)
    architecture = architecture_of(source)
    try:
        opened = open_base(base, source, architecture, allow_pickle=allow_pickle)
    except Mismatch:
        sign = idle_structure(source, *open_with_architecture(base, allow_pickle=allow_pickle))
        if sign is None:
            raise
        return BaseComparison(base, None, (sign,))
    first = prepared(Inputs(source, opened, architecture))
    looked_at = first.inputs.protected
    estimate = NearestOrbit().estimate(looked_at, opened, architecture, progress=progress)
    signs = find_signs(looked_at, opened, architecture, estimate, sources, progress)
    return BaseComparison(base, estimate, (*hidden_signs(first), *signs))


def _restructured(
    checkpoint: Path, base: Path, error: UnsupportedArchitecture, *, allow_pickle: bool
) -> tuple[TensorSource, Architecture, tuple[Sign, ...]]:
    """A checkpoint of no known family whose feed-forwards are not the base's; ``error`` where that is not it."""
    source = open_checkpoint(checkpoint, allow_pickle=allow_pickle)
    base_source, architecture = open_with_architecture(base, allow_pickle=allow_pickle)
    signs = structure_signs(under_names_on_disk(source), base_source, architecture)
    if not signs:
        raise error
    return source, architecture, tuple(signs)


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
        # GPT-2 stores them transposed: the head axis of a query projection is the second there.
        queries = [part.query.weight for part in block.parts[:1]]  # none where queries and keys are left alone
        are_rows = dict.fromkeys((*queries, block.value.weight), block.value.axis == 0)
        for name, rows_are_outputs in {**are_rows, block.output.weight: block.output.axis == 1}.items():
            if source.spec(name).dtype not in UNIT_ROUNDOFF:
                continue
            weight = source.tensor(name).float()
            weight = weight if rows_are_outputs else weight.T
            norm += float(weight.double().square().sum())
            for kind, stored in _rounded(weight):
                squares[kind] += float((stored - weight).double().square().sum())
    return {kind: math.sqrt(total / norm) if norm else 0.0 for kind, total in squares.items()}


def _rounded(weight: Tensor) -> Sequence[tuple[str, Tensor]]:
    grouped = weight if weight.shape[1] % GROUP else weight.reshape(-1, GROUP)
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
