"""Protect exactly: an expert goes in, a checkpoint that computes the same and does not merge comes out, with a key."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unmergeable.architecture import Architecture, Space
from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.checkpoint.dtypes import dtype_code, torch_dtype
from unmergeable.checkpoint.manifest import Manifest
from unmergeable.checkpoint.rewrite import OutputTensor, rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, KeyFileError, NotEquivalent
from unmergeable.gauge.act import compute_dtype, edits
from unmergeable.gauge.equivalence import UNIT_ROUNDOFF, Equivalence, changed_blocks, compare, rounded_factors
from unmergeable.gauge.gauge import Gauge
from unmergeable.gauge.key import Key, read_key, write_key
from unmergeable.gauge.plan import transformed
from unmergeable.ops.logits import LogitGap, logit_gap
from unmergeable.ops.opened import architecture_of, open_base, open_with_architecture
from unmergeable.ops.recipe import condition_bound, gauges_of, moves_streams, orders_of, recipe_of, spaces_of, unties
from unmergeable.ops.untied import UNTIED, UntiedSource, untied
from unmergeable.ops.workers import one_thread_per_kernel, worker_threads
from unmergeable.progress import Progress, silent
from unmergeable.protections import GaugeProtection
from unmergeable.randomness import KEY_BYTES, new_entropy
from unmergeable.settings import settings_of

logger = logging.getLogger(__name__)

WARNING = (
    "Stops off-the-shelf merging. Does not stop somebody who holds the base model: the base shows which basis the "
    "weights started in, and a least-squares fit per head undoes the protection in seconds."
)

VACUOUS = (
    "The bound on rounding is 1 or more: at this precision the check of the result says nothing. Measure the result on "
    "your task, or use smaller conditions, a narrower range for params, or float32."
)


@dataclass(frozen=True)
class ProtectResult:
    """What was (or, in a dry run, would be) written.

    ``predicted_error`` is the bound on each block's relative output error from rounding; ``measured_error`` the largest
    one found in the written file; ``logits`` the gap of the whole networks' outputs, or why it was not measured.
    """

    out: Path
    key: Path
    fingerprint: str
    architecture: str
    protections: tuple[Mapping[str, Any], ...]
    tensors: int
    changed_tensors: int
    condition_bound: float
    predicted_error: float
    groups: Mapping[str, str]
    is_dry_run: bool
    measured_error: float | None = None
    logits: LogitGap | None = None
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=(WARNING,))

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "key": str(self.key),
            "key_fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "protections": [dict(step) for step in self.protections],
            "tensors": self.tensors,
            "changed_tensors": self.changed_tensors,
            "condition_bound": self.condition_bound,
            "predicted_block_error": self.predicted_error,
            "measured_block_error": self.measured_error,
            "logits": self.logits.to_json() if self.logits else None,
            "groups": dict(self.groups),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "dry_run": self.is_dry_run,
            "notes": list(self.notes),
        }


@one_thread_per_kernel()
def protect_exactly(
    expert: Path,
    *,
    base: Path,
    out: Path,
    protections: Sequence[GaugeProtection],
    key: Path,
    seed: int | None = None,
    passphrase: str | None = None,
    dry_run: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> ProtectResult:
    """Write a protected copy of ``expert`` to ``out`` and its key to ``key``.

    ``out`` appears complete and verified, or not at all. Killed or out of disk, the same call resumes.

    Args:
        expert: checkpoint folder, or a LoRA folder to be merged into ``base`` first.
        base: the checkpoint it was fine-tuned from.
        out: folder to create.
        protections: applied left to right and rounded once.
        key: key file to create. An existing one is used only if it was made by this very call (the same expert, methods
            and settings), to resume.
        seed: draw the key from a public number instead of the operating system: for experiments only.
        passphrase: encrypts the secret in the key file.
        dry_run: check everything, write nothing.

    Raises:
        UsageError, BadInput, KeyFileError: before the first byte is written.
        NotEquivalent: the written file does not compute what the expert computes; it is removed.
    """
    source, architecture = open_with_architecture(expert, base=base, allow_pickle=allow_pickle)
    stored = source
    if unties(protections):
        source = untied(stored, architecture)
        architecture = architecture_of(source)
    base_source = open_base(base, source, architecture, allow_pickle=allow_pickle)
    spaces = spaces_of(protections, architecture)
    is_streaming = moves_streams(spaces)
    changed = architecture.symmetry.tensors_of(spaces)
    require_apart(key, out)
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out} exists and is never overwritten; name another folder, or remove it.")

    recipe = {**recipe_of(protections, architecture), "source": source.index.headers_digest}
    secret, is_new_key = _key_for(key, recipe, seed, passphrase)
    if is_new_key and not dry_run:
        secret = replace(secret, orders=orders_of(protections, architecture, source, base_source, progress))
    condition = condition_bound(protections)
    roundoff = max(UNIT_ROUNDOFF[source.spec(name).dtype] for name in changed)
    predicted = rounded_factors(through_streams=is_streaming) * condition * roundoff
    result = ProtectResult(
        out=out,
        key=key,
        fingerprint=secret.fingerprint,
        architecture=architecture.family,
        protections=tuple({"method": step.name, "settings": settings_of(step)} for step in protections),
        tensors=len(source.names),
        changed_tensors=len(changed),
        condition_bound=condition,
        predicted_error=predicted,
        groups=describe_groups(architecture, spaces),
        is_dry_run=dry_run,
        left_out=tuple((item.name, item.reason) for item in source.index.left_out),
        notes=(*([VACUOUS] if predicted >= 1 else []), *_unchanged_streams(protections, architecture), WARNING),
    )
    if dry_run:
        return result

    equivalences: list[Equivalence] = []
    gaps: list[LogitGap] = []

    def verify(written: TensorSource) -> dict[str, Any]:
        # Every tensor without a leg was copied byte for byte, so only blocks that changed can differ.
        touched = changed_blocks(architecture, list(spaces))
        found = compare(
            source,
            written,
            touched,
            condition=condition,
            threads=worker_threads(threads),
            blocks_only=True,
            through_streams=is_streaming,
            progress=progress,
        )
        if not found.is_equal:
            raise NotEquivalent(
                f"{out} would not compute what {expert} computes: {found.explain()}; nothing was written. "
                + _remedy(protections, architecture)
            )
        equivalences.append(found)
        gap = logit_gap(stored, written, condition, progress=progress)
        if gap.is_beyond_bound:
            raise NotEquivalent(
                f"{out}: outputs move by {gap.gap:.2e}, rounding explains {gap.bound:.2e}; nothing was written."
            )
        gaps.append(gap)
        return {"measured": _measured(found, gap)}

    gauges = gauges_of(protections, architecture, secret, source)
    if is_new_key:
        write_key(key, secret, passphrase)
    try:
        manifest = rewrite(
            stored,
            out,
            transformed(stored, architecture.symmetry, gauges, extra=_heads_apart(source, architecture, gauges)),
            config_changes=UNTIED if isinstance(source, UntiedSource) else None,
            manifest=_manifest(result, recipe, source, changed, seed),
            resume_token=secret.fingerprint,
            verify=verify,
            threads=threads,
            progress=progress,
        )
    except Exception:
        if is_new_key and not out.with_name(out.name + ".partial").exists():
            key.unlink(missing_ok=True)  # it opens nothing, and would be in the way of the next try
        raise
    return _finished(result, manifest, equivalences[0], gaps[0])


def _remedy(protections: Sequence[GaugeProtection], architecture: Architecture) -> str:
    """What to try where the result computes something else."""
    for protection in protections:
        changed = protection.spaces(architecture)
        turned = any(architecture.symmetry.spaces[name].group.kind == "rotary" for name in changed)
        if turned and settings_of(protection).get("as_published"):
            return (
                f"{protection.name} as published is not exact under the rotary positions of {architecture.family}; "
                "leave as_published out."
            )
    return "Try a smaller condition number."


def _unchanged_streams(protections: Sequence[GaugeProtection], architecture: Architecture) -> list[str]:
    """Why a protection that changes residual streams leaves one as it is."""
    if not any(settings_of(protection).get("residual") for protection in protections):
        return []
    streams = {name: why for name, why in architecture.symmetry.missing.items() if name.endswith("residual")}
    return [f"The {name.replace('.', ' ')} stream stays as it is: {reason}." for name, reason in streams.items()]


def _heads_apart(source: TensorSource, architecture: Architecture, gauges: Sequence[Gauge]) -> tuple[OutputTensor, ...]:
    """The output head of an untied checkpoint, beside the embedding it is made from."""
    if not isinstance(source, UntiedSource):
        return ()
    edit = edits(architecture.symmetry, gauges).get(OUTPUT_HEAD)
    shard = source.index.entries[source.embedding].shard
    return (OutputTensor(OUTPUT_HEAD, source.spec(OUTPUT_HEAD), shard, edit=edit, origin=source.embedding),)


def _finished(result: ProtectResult, manifest: Manifest, found: Equivalence, gap: LogitGap) -> ProtectResult:
    left_out = tuple((item.name, item.reason) for item in manifest.left_out)
    return replace(result, measured_error=max(block.error for block in found.blocks), logits=gap, left_out=left_out)


def _measured(found: Equivalence, gap: LogitGap) -> dict[str, Any]:
    worst = found.worst
    assert worst is not None
    return {
        "blocks": len(found.blocks),
        "largest_block_error": max(block.error for block in found.blocks),
        "worst_block": worst.name,
        # Errors of different blocks are independent: their squares add.
        "predicted_logit_error": math.sqrt(sum(block.error**2 for block in found.blocks)),
        "logits": gap.to_json(),
    }


def _manifest(
    result: ProtectResult, recipe: Mapping[str, Any], source: TensorSource, changed: Sequence[str], seed: int | None
) -> dict[str, Any]:
    return {
        "kind": "protected",
        "recipe": {name: value for name, value in recipe.items() if name != "source"},
        "architecture": result.architecture,
        "groups": dict(result.groups),
        "key_fingerprint": result.fingerprint,
        "key_from_public_seed": seed is not None,
        "condition_bound": result.condition_bound,
        "predicted_block_error": result.predicted_error,
        "stored_dtypes": sorted({source.spec(name).dtype for name in source.names}),
        "compute_dtypes": sorted({_computed_in(source.spec(name).dtype) for name in changed}),
        "changed_tensors": result.changed_tensors,
        "note": WARNING,
    }


def _computed_in(stored: str) -> str:
    return dtype_code(compute_dtype(torch_dtype(stored)))


def require_apart(key: Path, out: Path) -> None:
    """Raises KeyFileError when the key would lie in the folder that is published."""
    target = key.parent.resolve() / key.name
    for folder in (out, out.with_name(out.name + ".partial")):
        place = folder.parent.resolve() / folder.name
        if target == place or place in target.parents:
            raise KeyFileError(f"key file {key} would lie inside {out}, which you will publish; keep it elsewhere.")


def _key_for(path: Path, recipe: Mapping[str, Any], seed: int | None, passphrase: str | None) -> tuple[Key, bool]:
    """The key of an interrupted run of this very call, or a new one; and whether it is new."""
    if path.exists() or path.is_symlink():
        existing = read_key(path, passphrase)
        if existing.recipe != recipe:
            raise KeyFileError(
                f"key file {path} belongs to another checkpoint or recipe and is never overwritten; name another."
            )
        return existing, False
    if seed is None:
        return Key(new_entropy(), recipe), True
    logger.warning("the key is drawn from the public seed %d: anybody can make it again", seed)
    entropy = hashlib.blake2b(str(seed).encode(), digest_size=KEY_BYTES, person=b"unmergeable-pub").digest()
    return Key(entropy, recipe), True


def describe_groups(architecture: Architecture, spaces: Mapping[str, Space] | None = None) -> dict[str, str]:
    """For each role among ``spaces`` (those of attention when None), the group used and why it is no larger."""
    found: dict[str, str] = {}
    shown = architecture.symmetry.select("query_key", "value_output") if spaces is None else spaces
    for space in shown.values():
        reason = f" ({space.limit})" if space.limit else ""
        text = f"{space.group}{reason}"
        earlier = found.get(space.role)
        found[space.role] = text if earlier is None or text in earlier else f"{earlier}; {text}"
    return found
