"""Rotate: a release under a new key, from the release and its key alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.partial import require_absent_or_written, require_creatable, require_outside
from unmergeable.errors import BadInput
from unmergeable.ops.key_places import default_key, make_key_folder
from unmergeable.ops.opened import AnyPath
from unmergeable.ops.protection import kept_key, require_apart, write_prepared
from unmergeable.ops.recorded import EARLIER_STEPS
from unmergeable.ops.restoring import open_with_key
from unmergeable.progress import Progress, silent
from unmergeable.protections.exact import RestoredFacts, key_for
from unmergeable.threads import one_thread_per_kernel, worker_threads


@dataclass(frozen=True)
class RotateResult:
    """``measured_error``: largest relative error of a block against the release it was made from."""

    out: Path
    key: Path
    fingerprint: str
    architecture: str
    changed_tensors: int
    measured_error: float

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "key": str(self.key),
            "key_fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "changed_tensors": self.changed_tensors,
            "measured_block_error": self.measured_error,
        }

    def lines(self) -> list[str]:
        """What the owner has to know, for a terminal."""
        return [
            f"Rotated: {self.out} ({self.changed_tensors} tensors; {self.architecture})",
            f"Largest difference of a block from the earlier release: {self.measured_error:.1e} relative",
            f"Key: {self.key} (fingerprint {self.fingerprint[:8]})",
            "  The old key opens the old release only, which whoever has it still has.",
        ]


@one_thread_per_kernel()
def rotate(
    protected: AnyPath,
    *,
    key: AnyPath | None = None,
    out: AnyPath,
    new_key: AnyPath | None = None,
    passphrase: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> RotateResult:
    """Protect a release again under a new key, by the same methods and settings. The original is never written.

    What the old key's gauges changed is undone, and the new key's applied, at once; the result is rounded once more.

    Args:
        protected: folder that ``protect`` wrote, or ``hub:OWNER/NAME``.
        key: the key file made with it; None to look for it where keys are.
        out: folder to create.
        new_key: key file to create; one in the folder of keys when None (:mod:`unmergeable.ops.key_places`). One that
            exists is used only if it was made by this very call, to resume.
        passphrase: of the old key file; it encrypts the new one too.
        seed: draws the new key from a public number: for experiments only.
        threads: how many tensors are worked on at a time; None for one per processor.

    Raises:
        KeyFileError: as :func:`~unmergeable.ops.restoring.restore`, or the new key is in the way.
        BadInput: as :func:`~unmergeable.ops.restoring.restore`, or ``out`` cannot be created.
        UsageError: the method's key keeps what was found in the original.
        NotEquivalent: the result does not compute what the release computes.
    """
    folder, out = folder_of(protected), Path(out)
    path = Path(new_key) if new_key is not None else default_key(out)
    require_creatable(out)
    require_outside(out, folder)
    require_apart(path, out)
    require_absent_or_written(out)
    opened = open_with_key(folder, None if key is None else Path(key), passphrase)
    if new_key is None and path.parent != out.parent:
        make_key_folder(path)
    if not opened.is_recorded:
        raise BadInput(f"{folder} has no unmergeable.json, which says how it was made; copy that of the release there.")
    workers = worker_threads(threads)
    recipe = opened.methods.recipe_for(opened.source, opened.architecture)
    fresh, is_new = key_for(recipe, path, passphrase, seed)
    fresh = replace(fresh, marks=opened.key.marks) if is_new else fresh
    prepared = opened.methods.rotate(
        opened.source,
        opened.architecture,
        opened.key,
        fresh,
        threads=workers,
        progress=progress,
        is_public=seed is not None,
    )
    details = {
        "kind": "protected",
        "recipe": prepared.recipe,
        "architecture": opened.architecture.family,
        **prepared.record,
        "note": opened.methods.limits,
        **({EARLIER_STEPS: list(opened.earlier)} if opened.earlier else {}),
    }
    with kept_key(path, fresh, passphrase, out):
        facts, _ = write_prepared(prepared, out, details, threads=workers, progress=progress)
    assert isinstance(facts, RestoredFacts)
    return RotateResult(
        out, path, fresh.fingerprint, opened.architecture.family, facts.changed_tensors, facts.measured_error
    )
