"""Restore: a protected checkpoint and its key give the original back, to rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.manifest import Manifest, read_manifest
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, KeyFileError, shown
from unmergeable.gauge.key import Key, read_key
from unmergeable.ops.key_places import find_key, named_key
from unmergeable.ops.opened import AnyPath, open_with_architecture
from unmergeable.ops.protection import without_files, write_prepared
from unmergeable.ops.recorded import EARLIER_STEPS, earlier_steps, methods_of
from unmergeable.progress import Progress, silent
from unmergeable.protections import PROTECTIONS, Rewrite
from unmergeable.protections.exact import ExactSequence, RestoredFacts
from unmergeable.protections.marks import are_marks_of
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
    key: AnyPath | None = None,
    out: AnyPath,
    passphrase: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> RestoreResult:
    """Undo a keyed protection. Of a composition that ends with one, the result of the steps before it comes back.

    Args:
        protected: folder that ``protect`` wrote, or ``hub:OWNER/NAME``; or a copy that something else saved, without
            its ``unmergeable.json``.
        key: the key file made with it; None to look for it where keys are, by the fingerprint in the manifest.
        out: folder to create.
        passphrase: of the key file, where it is encrypted.
        threads: how many tensors are worked on at a time; None for one per processor.

    Raises:
        KeyFileError: no key, or not the key of this checkpoint; nothing is written.
        BadInput: ``protected`` was not made by ``protect``, or its last step has no key.
        NotEquivalent: the result does not compute what the protected checkpoint computes (its weights were altered).
    """
    folder, out = folder_of(protected), Path(out)
    opened = open_with_key(folder, None if key is None else Path(key), passphrase)
    source, architecture, secret, methods = opened.source, opened.architecture, opened.key, opened.methods
    prepared = methods.restore(source, architecture, secret, threads=worker_threads(threads), progress=progress)
    if not opened.is_recorded:
        _require_marks(prepared, secret, f"key file {opened.path}", folder)
    # What remains is the protected release that was protected again: its own record, and so its own way back.
    details: dict[str, Any] = {
        "kind": "restored",
        "key_fingerprint": secret.fingerprint,
        "architecture": architecture.family,
    }
    earlier = opened.earlier
    if earlier and "key_fingerprint" in earlier[-1]:
        details = {**without_files(earlier[-1]), **({EARLIER_STEPS: list(earlier[:-1])} if earlier[1:] else {})}
    facts, _ = write_prepared(prepared, out, details, threads=worker_threads(threads), progress=progress)
    assert isinstance(facts, RestoredFacts)
    note = _note(earlier) if earlier else None
    return RestoreResult(
        out, secret.fingerprint, architecture.family, facts.changed_tensors, facts.measured_error, note
    )


@dataclass(frozen=True)
class Opened:
    """A protected checkpoint with the key that opens it.

    ``path`` is that of the key. ``earlier`` is what is said of the steps before the last. ``is_recorded``: whether its
    manifest names the key; where it has none, only what comes out can tell whether the key fits.
    """

    source: TensorSource
    architecture: Architecture
    path: Path
    key: Key
    methods: ExactSequence
    earlier: tuple[Mapping[str, Any], ...]
    is_recorded: bool


def open_with_key(folder: Path, path: Path | None, passphrase: str | None) -> Opened:
    """Open what a key protects, reading headers only; ``path`` None for the key that lies where keys are.

    Raises:
        KeyFileError: no key, or not the key of this checkpoint.
        BadInput: ``folder`` was not made by ``protect``, or its last step has no key.
        UsageError: the key was made by a method that this version does not know.
    """
    manifest = None
    if path is None:
        manifest = read_manifest(folder)
        path = find_key(folder, _fingerprint(manifest))
    path = named_key(path)
    key = read_key(path, passphrase)
    manifest = manifest or read_manifest(folder)
    made_with = None if manifest is None else manifest.details.get("key_fingerprint")
    earlier = earlier_steps(manifest)
    _require_way_back(folder, manifest, key)
    source, architecture = open_with_architecture(folder)
    if made_with not in (None, key.fingerprint):
        raise KeyFileError(
            f"key file {path} (fingerprint {key.fingerprint[:8]}) is not the key of {folder} "
            f"({shown(made_with)[1:9]}); give the one made with it."
        )
    methods = ExactSequence.from_recipe(key.recipe, PROTECTIONS)
    return Opened(source, architecture, path, key, methods, earlier, is_recorded=made_with is not None)


def _fingerprint(manifest: Manifest | None) -> str | None:
    found = None if manifest is None else manifest.details.get("key_fingerprint")
    return found if isinstance(found, str) else None


def _require_way_back(folder: Path, manifest: Manifest | None, secret: Key) -> None:
    """Refuse what no key was made with, and a copy without a record where the key cannot tell whether it is its own."""
    details = {} if manifest is None else manifest.details
    if "key_fingerprint" in details:
        return
    if any("key_fingerprint" in step for step in earlier_steps(manifest)):
        raise BadInput(
            f"{folder}: what was done after the keyed step has no way back, so that the key opens nothing; keep "
            "the original."
        )
    if manifest is not None:
        raise BadInput(f"{folder}: its unmergeable.json is of no keyed protection; there is nothing to restore.")
    if not secret.marks:
        raise BadInput(
            f"{folder} has no unmergeable.json, and an earlier version made the key, which cannot tell without one "
            f"whether it fits; copy the unmergeable.json of the release into {folder}."
        )


def _require_marks(prepared: Rewrite, secret: Key, key: str, folder: Path) -> None:
    """Refuse a key that makes something else of the checkpoint than what it was made for."""
    plan = {tensor.name: tensor for tensor in prepared.plan}
    if not set(secret.marks) <= set(plan):
        raise KeyFileError(
            f"{key} was made for a checkpoint with other tensors than {folder}; give the one made with it."
        )

    def restored(name: str) -> Tensor:
        made = plan[name]
        tensor = prepared.source.tensor(made.origin or name)
        return tensor if made.edit is None else made.edit(tensor)

    if not are_marks_of(secret.marks, restored):
        raise KeyFileError(
            f"{key} (fingerprint {secret.fingerprint[:8]}) is not the key of {folder}: with it the weights are not "
            "those it was made for; give the one made with it."
        )


def _note(earlier: Sequence[Mapping[str, Any]]) -> str:
    """What the result is, by the record of the step that made it."""
    last = earlier[-1]
    if "key_fingerprint" in last:
        return (
            f"This is a protected release itself, with key {str(last['key_fingerprint'])[:8]}; restore it with that "
            "key to get the original."
        )
    methods = ", ".join(name for step in earlier if "key_fingerprint" not in step for name in methods_of(step))
    return f"This is the result of {methods}, which no key undoes, and not the original."
