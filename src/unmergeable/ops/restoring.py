"""Restore: a protected checkpoint and its key give the original back, to rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.checkpoint.rewrite import rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, KeyFileError, NotEquivalent
from unmergeable.gauge.equivalence import changed_blocks, compare
from unmergeable.gauge.gauge import undo
from unmergeable.gauge.key import read_key
from unmergeable.gauge.plan import transformed
from unmergeable.ops.opened import architecture_of, open_with_architecture
from unmergeable.ops.protection import EARLIER_STEPS
from unmergeable.ops.recipe import condition_bound, gauges_of, moves_streams, protections_of, spaces_of, unties
from unmergeable.ops.untied import TIED, untied
from unmergeable.ops.workers import one_thread_per_kernel, worker_threads
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class RestoreResult:
    """``measured_error``: largest relative error of a block against the protected checkpoint.

    ``note`` says what was restored where that is not the expert.
    """

    out: Path
    fingerprint: str
    architecture: str
    changed_tensors: int
    measured_error: float
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "key_fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "changed_tensors": self.changed_tensors,
            "measured_block_error": self.measured_error,
            "note": self.note,
        }


@one_thread_per_kernel()
def restore(
    protected: Path,
    *,
    key: Path,
    out: Path,
    passphrase: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> RestoreResult:
    """Undo a keyed protection. Of a composition that ends with one, the result of the steps before it comes back.

    Raises:
        KeyFileError: no key, or not the key of this checkpoint; nothing is written.
        BadInput: ``protected`` was not made by ``protect``, or its last step has no key.
        NotEquivalent: the result does not compute what the protected checkpoint computes (its weights were altered).
    """
    secret = read_key(key, passphrase)
    manifest = read_manifest(protected)
    earlier = () if manifest is None else manifest.details.get(EARLIER_STEPS, ())
    if manifest is None or "key_fingerprint" not in manifest.details:
        if any("key_fingerprint" in step for step in earlier):
            raise BadInput(
                f"{protected}: what was done after the keyed step has no way back, so that the key opens nothing; keep "
                "the original."
            )
        raise BadInput(f"{protected} has no unmergeable.json of a keyed protection; there is nothing to restore.")
    source, architecture = open_with_architecture(protected)
    if manifest.details["key_fingerprint"] != secret.fingerprint:
        raise KeyFileError(
            f"key file {key} (fingerprint {secret.fingerprint[:8]}) is not the key of {protected} "
            f"({str(manifest.details['key_fingerprint'])[:8]}); give the one made with it."
        )
    protections = protections_of(secret.recipe)
    spaces = spaces_of(protections, architecture)
    condition = condition_bound(protections)
    errors: list[float] = []
    is_untied = unties(protections)

    def verify(written: TensorSource) -> dict[str, Any]:
        touched = changed_blocks(architecture, list(spaces))
        found = compare(
            source,
            untied(written, architecture_of(written)) if is_untied else written,
            touched,
            condition=condition,
            threads=worker_threads(threads),
            blocks_only=True,
            through_streams=moves_streams(spaces),
            progress=progress,
        )
        if not found.is_equal:
            raise NotEquivalent(
                f"{out} would not compute what {protected} computes: {found.explain()}; nothing was written."
            )
        errors.append(max(block.error for block in found.blocks))
        return {"measured": {"largest_block_error": errors[0]}}

    gauges = undo(gauges_of(protections, architecture, secret, source))
    rewrite(
        source,
        out,
        transformed(source, architecture.symmetry, gauges, drop=[OUTPUT_HEAD] if is_untied else []),
        config_changes=TIED if is_untied else None,
        manifest={"kind": "restored", "key_fingerprint": secret.fingerprint, "architecture": architecture.family},
        resume_token=f"restore {secret.fingerprint}",
        verify=verify,
        threads=threads,
        progress=progress,
    )
    changed = architecture.symmetry.tensors_of(spaces)
    note = _note(earlier) if earlier else None
    return RestoreResult(out, secret.fingerprint, architecture.family, len(changed), errors[0], note)


def _note(earlier: Sequence[Mapping[str, Any]]) -> str:
    methods = ", ".join(str(step["recipe"]["method"]) for step in earlier)
    return f"This is the result of {methods}, which no key undoes, and not the original."
