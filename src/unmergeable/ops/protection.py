"""Protect: an expert goes in, a checkpoint that works alone but does not merge comes out.

One function for every protection and every composition of them. A single step writes OUT itself. Several write their
results below ``OUT.steps``, each from the one before; the last becomes OUT by a rename, with what the others did in its
manifest. Everything that can be refused is refused before the first step begins, by a dry run of all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from unmergeable.checkpoint.disk import replace_file, sync_folder
from unmergeable.checkpoint.index import is_adapter
from unmergeable.checkpoint.listing import MANIFEST_NAME
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.partial import require_absent
from unmergeable.errors import BadInput, UsageError
from unmergeable.ops.exact import protect_exactly, require_apart
from unmergeable.ops.mergeguard import protect_with_mergeguard
from unmergeable.ops.polynomials import protect_with_polynomials
from unmergeable.ops.sensitivity_shield import protect_with_shield
from unmergeable.ops.steps import Reads, Step, steps_of
from unmergeable.progress import Progress, silent
from unmergeable.protections import POLYNOMIAL_PROTECTIONS, PROTECTIONS, SensitivityShield
from unmergeable.settings import configure

EARLIER_STEPS = "earlier_steps"
"""What the manifest of a composition says of the steps before the last, a list of their manifests without outputs."""

_REQUEST = "request.json"


class Protected(Protocol):
    """What every protection reports."""

    @property
    def out(self) -> Path: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ComposedResult:
    """What several steps, one after another, did (or, in a dry run, would do).

    ``steps``: of each what it reported; of one that an interrupted run had finished, what its manifest says. ``key`` of
    the exact step, None where there is none.
    """

    out: Path
    key: Path | None
    methods: tuple[str, ...]
    steps: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    is_dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "key": str(self.key) if self.key else None,
            "methods": list(self.methods),
            "steps": [dict(step) for step in self.steps],
            "dry_run": self.is_dry_run,
            "notes": list(self.notes),
        }


def protect(
    expert: Path,
    *,
    base: Path,
    out: Path,
    method: str | Sequence[str] = "mergelock",
    key: Path | None = None,
    settings: Mapping[str, object] | None = None,
    seed: int | None = None,
    passphrase: str | None = None,
    data: Path | None = None,
    head: Path | None = None,
    encoder: Path | None = None,
    siblings: Sequence[Path] = (),
    dry_run: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Protected:
    """Write a protected copy of ``expert`` to ``out``, and a key where an exact method is among them.

    ``out`` appears complete, or not at all. Killed or out of disk, the same call resumes.

    Args:
        expert: checkpoint folder, or a LoRA folder to be merged into ``base`` first.
        base: the checkpoint it was fine-tuned from.
        out: folder to create.
        method: protections, applied left to right; exact ones that stand next to each other are rounded once.
        key: key file to create where a method is exact; ``out`` with ``.key`` appended when None. An existing one is
            used only if it was made by this very call, to resume.
        settings: of the methods, by name, or by ``method.name`` where several have it.
        seed: of training and of random choices, 0 when None. Of an exact method it draws the key from a public number
            instead of the operating system: for experiments only.
        passphrase: encrypts the secret in the key file.
        data: examples of what the expert is used for, for methods that are calibrated or trained.
        head: file of the task's head, where the expert ends in features (:mod:`unmergeable.tasks`).
        encoder: folder whose tokenizer or image processor prepares the data; None for the expert's.
        siblings: other fine-tunes of the base, for ``sensitivity_shield``.
        dry_run: check everything, write nothing.
        allow_pickle: read a checkpoint that has no safetensors files; exact methods only.

    Returns:
        A ``ProtectResult``, ``PolynomialResult``, ``ShieldResult`` or ``MergeGuardResult``; of several steps a
        :class:`ComposedResult`.

    Raises:
        UsageError, BadInput, KeyFileError: before the first byte is written.
        NotEquivalent: the written file does not compute what it should; it is removed.
    """
    steps = steps_of(method, settings or {})
    request = _Request(
        expert, base, out, key, seed, passphrase, data, head, encoder, tuple(siblings), allow_pickle, threads, progress
    )
    request.require_use(steps)
    if not out.parent.is_dir():  # found out by the writer as well, but training comes before it
        raise BadInput(f"{out} cannot be created: its parent folder {out.parent} does not exist; create it first.")
    if len(steps) == 1:
        return request.run(steps[0], expert, out, is_dry_run=dry_run)
    return _compose(request, steps, is_dry_run=dry_run)


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`protect` that every step shares."""

    expert: Path
    base: Path
    out: Path
    key: Path | None
    seed: int | None
    passphrase: str | None
    data: Path | None
    head: Path | None
    encoder: Path | None
    siblings: tuple[Path, ...]
    allow_pickle: bool
    threads: int | None
    progress: Progress

    @property
    def key_path(self) -> Path:
        return self.key or self.out.with_name(f"{self.out.name}.key")

    @property
    def given(self) -> Mapping[Reads, object]:
        """What was given for the methods to read."""
        return {"data": self.data, "head": self.head, "encoder": self.encoder, "siblings": self.siblings}

    def require_use(self, steps: Sequence[Step]) -> None:
        """Raises UsageError for something that no step has a use for."""
        names = ",".join(step.name for step in steps)
        for what, value in self.given.items():
            if value and not any(what in step.reads for step in steps):
                raise UsageError(f"{names} with these settings reads no {what}: leave out {what}.")
        if self.allow_pickle and not steps[0].is_exact:
            raise UsageError(
                f"{steps[0].name} reads safetensors only: convert the checkpoint and leave out allow_pickle."
            )

    def run(self, step: Step, source: Path, out: Path, *, is_dry_run: bool) -> Protected:
        """One step, from the folder ``source`` to the folder ``out``."""
        return _runner(step)(self, step, source, out, is_dry_run)


_Run = Callable[[_Request, Step, Path, Path, bool], Protected]


def _runner(step: Step) -> _Run:
    if step.is_exact:
        return _run_exact
    if step.name in POLYNOMIAL_PROTECTIONS:
        return _run_polynomials
    return _run_shield if step.name == SensitivityShield.name else _run_mergeguard


def _run_exact(request: _Request, step: Step, source: Path, out: Path, is_dry_run: bool) -> Protected:
    return protect_exactly(
        source,
        base=request.base,
        out=out,
        protections=[configure(PROTECTIONS[name], step.settings[name]) for name in step.methods],
        key=request.key_path,
        seed=request.seed,
        passphrase=request.passphrase,
        dry_run=is_dry_run,
        allow_pickle=request.allow_pickle,
        threads=request.threads,
        progress=request.progress,
    )


def _run_polynomials(request: _Request, step: Step, source: Path, out: Path, is_dry_run: bool) -> Protected:
    return protect_with_polynomials(
        source,
        base=request.base,
        out=out,
        method=step.name,
        data=request.data if "data" in step.reads else None,
        settings=step.settings[step.name],
        dry_run=is_dry_run,
        threads=request.threads,
        progress=request.progress,
    )


def _run_shield(request: _Request, step: Step, source: Path, out: Path, is_dry_run: bool) -> Protected:
    return protect_with_shield(
        source,
        base=request.base,
        out=out,
        siblings=request.siblings if "siblings" in step.reads else (),
        data=request.data if "data" in step.reads else None,
        encoder=request.encoder,
        settings=step.settings[step.name],
        seed=request.seed or 0,
        threads=request.threads,
        dry_run=is_dry_run,
        progress=request.progress,
    )


def _run_mergeguard(request: _Request, step: Step, source: Path, out: Path, is_dry_run: bool) -> Protected:
    return protect_with_mergeguard(
        source,
        base=request.base,
        out=out,
        data=request.data if "data" in step.reads else None,
        head=request.head,
        encoder=request.encoder,
        settings=step.settings[step.name],
        seed=request.seed or 0,
        threads=request.threads,
        dry_run=is_dry_run,
        progress=request.progress,
    )


def _compose(request: _Request, steps: Sequence[Step], *, is_dry_run: bool) -> ComposedResult:
    """Check every step, do every step, and give the last one's result its place."""
    require_absent(request.out)
    place = request.out.with_name(f"{request.out.name}.steps")
    identity = _identity(request, steps)
    _require_ours(place, identity)
    key = request.key_path if any(step.is_exact for step in steps) else None
    if key is not None:
        for folder in (request.out, place):
            require_apart(key, folder)
    folders = [place / str(number) for number in range(1, len(steps) + 1)]
    reports: list[Mapping[str, Any]] = [
        request.run(step, source, request.out, is_dry_run=True).to_json()
        for step, source, folder in _inputs(request, steps, folders)
        if not folder.exists()
    ]
    if not is_dry_run:
        place.mkdir(exist_ok=True)
        replace_file(place / _REQUEST, identity.encode())
        reports = _run_all(request, steps, folders)
        _write_earlier_steps(folders)
        require_absent(request.out)
        folders[-1].rename(request.out)
        sync_folder(request.out.parent)
        shutil.rmtree(place)
    notes = dict.fromkeys(note for report in reports for note in _notes_in(report))
    return ComposedResult(
        request.out, key, tuple(step.name for step in steps), tuple(reports), tuple(notes), is_dry_run
    )


def _run_all(request: _Request, steps: Sequence[Step], folders: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Do the steps that are not done yet, each from the folder before it; what each has to report."""
    reports: list[Mapping[str, Any]] = []
    source = request.expert
    for step, folder in zip(steps, folders, strict=True):
        if folder.exists():
            report = _manifest_json(folder)
        else:
            report = request.run(step, source, folder, is_dry_run=False).to_json()
        reports.append({**report, "out": str(request.out if folder == folders[-1] else folder)})
        source = folder
    return reports


def _notes_in(report: Mapping[str, Any]) -> Sequence[str]:
    """The sentences of a step that the owner has to read."""
    notes: Sequence[str] = report["notes"] if "notes" in report else [report["note"]]
    return notes


def _inputs(request: _Request, steps: Sequence[Step], folders: Sequence[Path]) -> Iterator[tuple[Step, Path, Path]]:
    """What a dry run of each step looks at: what the step before it wrote, or else something of the same shapes."""
    # A LoRA folder is merged by the first step; for the others the base stands in.
    stand_in = request.base if request.expert.is_dir() and is_adapter(request.expert) else request.expert
    for number, (step, folder) in enumerate(zip(steps, folders, strict=True)):
        before = folders[number - 1]
        yield step, request.expert if number == 0 else before if before.exists() else stand_in, folder


def _identity(request: _Request, steps: Sequence[Step]) -> str:
    """What the work below ``OUT.steps`` was begun for."""
    paths = {what: value for what, value in request.given.items() if value}
    source = open_checkpoint(request.expert, base=request.base, allow_pickle=request.allow_pickle)
    return json.dumps(
        {
            "expert": source.index.headers_digest,
            "base": request.base.resolve(),
            "steps": [[step.methods, step.settings] for step in steps],
            "seed": request.seed,
            **paths,
        },
        default=str,
        sort_keys=True,
    )


def _require_ours(place: Path, identity: str) -> None:
    """Raises BadInput when ``place`` holds anything but the unfinished work of this very request."""
    if not place.is_symlink() and (not place.exists() or (place.is_dir() and not any(place.iterdir()))):
        return
    told = place / _REQUEST
    if place.is_symlink() or not told.is_file() or told.read_text() != identity:
        raise BadInput(f"{place} holds the unfinished work of another request: remove it, or choose another OUT.")


def _manifest_json(folder: Path) -> dict[str, Any]:
    """What a step's manifest says, but for the files that are gone with it."""
    document = json.loads((folder / MANIFEST_NAME).read_text())
    return {name: value for name, value in document.items() if name not in ("format_version", "tool", "outputs")}


def _write_earlier_steps(folders: Sequence[Path]) -> None:
    manifest = read_manifest(folders[-1])
    assert manifest is not None, "every step writes one"
    earlier = [_manifest_json(folder) for folder in folders[:-1]]
    record = replace(manifest, details={**manifest.details, EARLIER_STEPS: earlier})
    replace_file(folders[-1] / MANIFEST_NAME, record.to_json().encode())
