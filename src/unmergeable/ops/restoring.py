"""Restore: a protected checkpoint and its key give the original back, to rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.errors import BadInput, KeyFileError
from unmergeable.gauge.key import read_key
from unmergeable.ops.opened import AnyPath, open_with_architecture
from unmergeable.ops.protection import EARLIER_STEPS, write_prepared
from unmergeable.progress import Progress, silent
from unmergeable.protections import PROTECTIONS
from unmergeable.protections.exact import ExactSequence, RestoredFacts
from unmergeable.threads import one_thread_per_kernel, worker_threads


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

    def lines(self) -> list[str]:
        """What the owner has to know, for a terminal."""
        lines = [
            f"Restored: {self.out} ({self.changed_tensors} tensors; {self.architecture})",
            f"Largest difference of a block from the protected one: {self.measured_error:.1e} relative",
        ]
        return [*lines, self.note] if self.note else lines


@one_thread_per_kernel()
def restore(
    protected: AnyPath,
    *,
    key: AnyPath,
    out: AnyPath,
    passphrase: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> RestoreResult:
    """Undo a keyed protection. Of a composition that ends with one, the result of the steps before it comes back.

    Args:
        protected: folder that ``protect`` wrote, or ``hub:OWNER/NAME``.
        key: the key file made with it.
        out: folder to create.
        passphrase: of the key file, where it is encrypted.
        threads: how many tensors are worked on at a time; None for one per processor.

    Raises:
        KeyFileError: no key, or not the key of this checkpoint; nothing is written.
        BadInput: ``protected`` was not made by ``protect``, or its last step has no key.
        NotEquivalent: the result does not compute what the protected checkpoint computes (its weights were altered).
    """
    folder, out = folder_of(protected), Path(out)
    secret = read_key(Path(key), passphrase)
    manifest = read_manifest(folder)
    earlier = () if manifest is None else manifest.details.get(EARLIER_STEPS, ())
    if manifest is None or "key_fingerprint" not in manifest.details:
        if any("key_fingerprint" in step for step in earlier):
            raise BadInput(
                f"{folder}: what was done after the keyed step has no way back, so that the key opens nothing; keep "
                "the original."
            )
        raise BadInput(f"{folder} has no unmergeable.json of a keyed protection; there is nothing to restore.")
    source, architecture = open_with_architecture(folder)
    if manifest.details["key_fingerprint"] != secret.fingerprint:
        raise KeyFileError(
            f"key file {key} (fingerprint {secret.fingerprint[:8]}) is not the key of {folder} "
            f"({str(manifest.details['key_fingerprint'])[:8]}); give the one made with it."
        )
    methods = ExactSequence.from_recipe(secret.recipe, PROTECTIONS)
    prepared = methods.restore(source, architecture, secret, threads=worker_threads(threads), progress=progress)
    details = {"kind": "restored", "key_fingerprint": secret.fingerprint, "architecture": architecture.family}
    facts, _ = write_prepared(prepared, out, details, threads=worker_threads(threads), progress=progress)
    assert isinstance(facts, RestoredFacts)
    note = _note(earlier) if earlier else None
    return RestoreResult(
        out, secret.fingerprint, architecture.family, facts.changed_tensors, facts.measured_error, note
    )


def _note(earlier: Sequence[Mapping[str, Any]]) -> str:
    methods = ", ".join(str(step["recipe"]["method"]) for step in earlier)
    return f"This is the result of {methods}, which no key undoes, and not the original."
