"""Protect: an expert goes in, a checkpoint that works alone but does not merge comes out.

One function for every protection and every composition of them. A single step writes OUT itself. Several write their
results below ``OUT.steps``, each from the one before; the last becomes OUT by a rename, with what the others did in its
manifest. Everything that can be refused is refused before the first step begins, by a dry run of all of them.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from unmergeable.checkpoint import scratch
from unmergeable.checkpoint.disk import replace_file, sync_folder, writing
from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.index import is_adapter
from unmergeable.checkpoint.listing import MANIFEST_NAME
from unmergeable.checkpoint.manifest import Manifest, check_files, read_manifest
from unmergeable.checkpoint.modules import module_folders_of
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.partial import (
    partial_of,
    require_absent,
    require_absent_or_written,
    require_creatable,
    require_outside,
)
from unmergeable.checkpoint.rewrite import folders_read, require_space, rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import CheckpointError, KeyFileError, UsageError
from unmergeable.gauge.key import Key, read_key, write_key
from unmergeable.gauge.signature import sign
from unmergeable.ops.adapter_release import release_adapter, release_trained_adapter
from unmergeable.ops.key_places import default_key, make_key_folder
from unmergeable.ops.opened import AnyPath
from unmergeable.ops.protect_inputs import open_inputs, open_inputs_with
from unmergeable.ops.protect_result import ProtectResult, StepReport
from unmergeable.ops.recorded import EARLIER_STEPS, earlier_steps, methods_of
from unmergeable.ops.relation import look_at_base
from unmergeable.ops.steps import Methods, Step, settings_for_part, steps_of
from unmergeable.pools.pool import Pool
from unmergeable.pools.ray_pool import RayPool
from unmergeable.progress import Progress, silent
from unmergeable.protections import CONTROLS, PROTECTIONS, Extras, Facts, Inputs, Protection, Rewrite
from unmergeable.protections.exact import ExactProtection
from unmergeable.protections.trained import LEFTOVERS, TrainedProtection
from unmergeable.settings import configure, nearest
from unmergeable.threads import one_thread_per_kernel, worker_threads

logger = logging.getLogger(__name__)

_OF_THE_FILES = ("format_version", "tool", "outputs", "signature")

_TRAINING, _STEPS = _BESIDE = (".training", ".steps")
"""What the names of folders beside OUT end in, apart from its own ``.partial``."""


def protect(
    expert: AnyPath,
    *,
    base: AnyPath,
    out: AnyPath,
    method: Methods = None,
    key: AnyPath | None = None,
    settings: Mapping[str, object] | None = None,
    part: str | None = None,
    seed: int | None = None,
    passphrase: str | None = None,
    data: AnyPath | None = None,
    head: AnyPath | None = None,
    encoder: AnyPath | None = None,
    siblings: Sequence[AnyPath] = (),
    generic: AnyPath | None = None,
    keep_adapter: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    ray: str | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> ProtectResult:
    """Write a protected copy of ``expert`` to ``out``, and a key where an exact method is among them.

    ``out`` appears complete, or not at all. Killed or out of disk, the same call resumes.

    Args:
        expert: checkpoint folder, a LoRA folder to be merged into ``base`` first, or ``hub:OWNER/NAME``.
        base: the checkpoint it was fine-tuned from, likewise.
        out: folder to create.
        method: protections, applied left to right; exact ones that stand next to each other are rounded once. None for
            the default, ``gauge``. Exact ones keep quantised models as they were, unless their settings say otherwise
            (:mod:`unmergeable.defaults`).
        key: key file to create where a method is exact; one in the folder of keys when None
            (:mod:`unmergeable.ops.key_places`). An existing one is used only if it was made by this very call, to
            resume.
        settings: of the methods, by name, or by ``method.name`` where several have it.
        part: the only part of a network of several that is changed, "language" or "vision"; None for all of it. For
            exact methods (:mod:`unmergeable.architecture.parts`).
        seed: of training and of random choices, 0 when None. Of an exact method it draws the key from a public number
            instead of the operating system: for experiments only.
        passphrase: encrypts the secret in the key file.
        data: examples of what the expert is used for, for methods that are calibrated or trained.
        head: file of the task's head, where the expert ends in features (:mod:`unmergeable.tasks`).
        encoder: folder whose tokenizer or image processor prepares the data; None for the expert's.
        siblings: other fine-tunes of the base, for ``sensitivity_shield``.
        generic: inputs of other kinds than the task's, for ``collapse``; without labels.
        keep_adapter: write an adapter again, its A and B in another basis of their rank: the one exact change that
            leaves the base alone. It stops nothing (:mod:`unmergeable.ops.adapter_release`), and takes no key. With a
            method that trains, A and B are trained instead.
        dry_run: check everything, write nothing.
        allow_pickle: read a checkpoint that has no safetensors files; exact methods only.
        threads: how many tensors are worked on at a time; None for one per processor, or one in each process of a
            cluster.
        ray: address of a Ray cluster to share the work among, ``local`` for one of this machine; the machines must see
            ``expert``, ``base`` and ``out`` under the same paths. For exact methods. The result is the same.
        workers: the most processes of the cluster, None for one for each of its processors.

    Raises:
        UsageError, BadInput, KeyFileError: before the first byte is written.
        NotEquivalent: the written file does not compute what it should; it is removed.
    """
    if workers is not None and ray is None:
        raise UsageError("workers is for a Ray cluster: give ray as well, or threads for this machine.")
    if keep_adapter and ray is not None:
        raise UsageError("keep_adapter works on one machine: leave out ray.")
    if keep_adapter and not method:
        others: dict[str, object] = {
            "settings": settings,
            "part": part,
            "key": key,
            "passphrase": passphrase,
            "data": data,
        }
        others |= {"head": head, "encoder": encoder, "siblings": siblings, "generic": generic}
        for name, value in others.items():
            if value:
                raise UsageError(
                    f"keep_adapter changes nothing but the basis inside the adapter's rank: leave out {name}, or merge "
                    "the adapter into its base by leaving out keep_adapter."
                )
        return release_adapter(folder_of(expert), base=folder_of(base), out=Path(out), seed=seed, is_dry_run=dry_run)
    steps = steps_of(method, settings_for_part(method, settings or {}, part))
    extras = Extras(
        data=_path(data),
        head=_path(head),
        encoder=_path(encoder),
        siblings=tuple(map(folder_of, siblings)),
        generic=_path(generic),
    )
    _require_use(steps, extras, allow_pickle=allow_pickle)
    if ray is not None:
        _require_shareable(steps)
    out = Path(out)
    request = _Request(
        expert=folder_of(expert),
        base=folder_of(base),
        out=out,
        key=(Path(key) if key is not None else default_key(out)),
        extras=extras,
        seed=seed,
        passphrase=passphrase,
        allow_pickle=allow_pickle,
        threads=worker_threads(threads),
        progress=progress,
    )
    has_own_place = key is not None or default_key(out).parent == out.parent
    request.require_places(steps, has_folder=has_own_place)
    if not has_own_place and not dry_run and any(step.has_key for step in steps):
        make_key_folder(request.key)
    if keep_adapter:
        return request.train_adapter(steps, is_dry_run=dry_run)
    if len(steps) > 1:
        return _compose(request, steps, is_dry_run=dry_run)
    (step,) = steps
    # What an exact method wrote says all that its bytes depend on: the writer knows it again.
    may_be_there = step.requirements.exact and not dry_run
    (require_absent_or_written if may_be_there else require_absent)(out)
    if dry_run:
        return request.result(steps, [request.check(step, request.expert)], is_dry_run=True)
    with nullcontext() if ray is None else RayPool(ray, workers, uses_gpus=False) as pool:
        request = replace(request, pool=pool, pool_threads=threads or 1)
        report = request.write(step, request.expert, out)
    return request.result(steps, [report], is_dry_run=False)


def write_control(
    expert: AnyPath,
    *,
    base: AnyPath,
    out: AnyPath,
    method: str,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Write ``expert`` to ``out`` as a control changes it: in a way that protects nothing, for audits to find that out.

    Raises:
        UsageError: no such control, or a setting out of range.
        BadInput: the checkpoints cannot be used, or ``out`` exists.
    """
    if method not in CONTROLS:
        raise UsageError(f"no control is called {method!r}{nearest(method, CONTROLS)}")
    control = configure(CONTROLS[method], settings or {})
    inputs = open_inputs(folder_of(expert), folder_of(base))
    inputs = replace(inputs, seed=seed, threads=worker_threads(threads), progress=progress)
    _, manifest = _write(control, control.prepare(inputs), inputs, Path(out))
    return manifest


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


def _require_use(steps: Sequence[Step], extras: Extras, *, allow_pickle: bool) -> None:
    names = ",".join(step.name for step in steps)
    for extra in fields(extras):
        if getattr(extras, extra.name) and not any(extra.name in step.reads for step in steps):
            raise UsageError(f"{names} with these settings reads no {extra.name}: leave out {extra.name}.")
    if allow_pickle and not steps[0].has_key:
        raise UsageError(f"{steps[0].name} reads safetensors only: convert the checkpoint and leave out allow_pickle.")


def _require_shareable(steps: Sequence[Step]) -> None:
    for step in steps:
        if not step.protection.is_shareable:
            methods = [name for name, method in PROTECTIONS.items() if issubclass(method, ExactProtection)]
            raise UsageError(
                f"{step.name} works on one machine: leave out ray, or use one of {', '.join(sorted(methods))}."
            )


@one_thread_per_kernel()
def write_prepared(
    prepared: Rewrite, out: Path, details: Mapping[str, Any], *, threads: int, progress: Progress
) -> tuple[Facts, Manifest]:
    """Write a prepared checkpoint to ``out``, with ``details`` in its manifest; its facts after verification.

    Where there is a key, it signs the manifest.
    """
    facts = prepared.facts

    def verify(written: TensorSource) -> Mapping[str, Any]:
        nonlocal facts
        facts = facts if prepared.verify is None else prepared.verify(written)
        return facts.record()

    manifest = rewrite(
        prepared.source,
        out,
        prepared.plan,
        manifest=details,
        resume_token=prepared.resume_token,
        config_changes=prepared.config_changes,
        also_read=prepared.also_read,
        verify=verify,
        is_determined=prepared.is_determined,
        sign=None if prepared.key is None else partial(sign, prepared.key),
        threads=threads,
        shared=prepared.shared,
        progress=progress,
    )
    return facts, manifest


def _write(protection: Protection, prepared: Rewrite, inputs: Inputs, out: Path) -> tuple[Facts, Manifest]:
    details = {
        "kind": "control" if protection.is_control else "protected",
        "recipe": prepared.recipe,
        "architecture": inputs.architecture.family,
        **prepared.record,
        **({"note": protection.limits} if protection.limits else {}),
        **record_of_steps(inputs.expert.folder),
    }
    return write_prepared(prepared, out, details, threads=inputs.threads, progress=inputs.progress)


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`protect` that every step shares."""

    expert: Path
    base: Path
    out: Path
    key: Path
    extras: Extras
    seed: int | None
    passphrase: str | None
    allow_pickle: bool
    threads: int
    progress: Progress
    pool: Pool | None = None
    pool_threads: int = 1

    def require_places(self, steps: Sequence[Step], *, has_folder: bool) -> None:
        """Refuse places that cannot be written to: training and calibration come before the writing.

        ``has_folder``: whether the key's folder must be there already.
        """
        require_creatable(self.out, *_BESIDE)
        if any(step.has_key for step in steps):
            require_apart(self.key, self.out)
            if has_folder and not self.key.parent.is_dir():
                raise KeyFileError(
                    f"key file {self.key} cannot be created: its folder does not exist; create it first: "
                    f"{shlex.join(['mkdir', '-p', str(self.key.parent)])}"
                )

    def inputs(self, step: Step, source: Path, out: Path) -> Inputs:
        """What a step works on, ``source`` being the expert or what the step before wrote."""
        given = {extra.name: getattr(self.extras, extra.name) for extra in fields(Extras) if extra.name in step.reads}
        allow_pickle = self.allow_pickle if step.has_key else None
        if self.pool is None:
            opened = open_inputs(source, self.base, allow_pickle=allow_pickle)
        else:
            opened = open_inputs_with(
                self.pool,
                source,
                self.base,
                allow_pickle=allow_pickle,
                threads=self.pool_threads,
                progress=self.progress,
            )
        return replace(
            opened,
            extras=Extras(**given),
            key_file=self.key if step.has_key else None,
            passphrase=self.passphrase,
            seed=self.seed,
            threads=self.threads,
            work=out.with_name(out.name + _TRAINING),
            progress=self.progress,
        )

    def train_adapter(self, steps: Sequence[Step], *, is_dry_run: bool) -> ProtectResult:
        """Train an adapter that stays one."""
        step, *more = steps
        if more or not (isinstance(step.protection, TrainedProtection) and step.protection.trains_adapters):
            methods = [name for name, method in PROTECTIONS.items() if getattr(method, "trains_adapters", False)]
            raise UsageError(
                f"{','.join(one.name for one in steps)} changes whole weights: with keep_adapter give one of "
                f"{', '.join(sorted(methods))}, or no method, or leave out keep_adapter."
            )
        if not is_adapter(self.expert):
            raise UsageError(f"{self.expert} is no adapter: leave out keep_adapter.")
        inputs = self.inputs(step, self.expert, self.out)
        result = release_trained_adapter(step.protection, inputs, self.expert, out=self.out, is_dry_run=is_dry_run)
        if inputs.work is not None and not is_dry_run:
            _remove([inputs.work / name for name in LEFTOVERS], inputs.work)
        return result

    def key_of(self, steps: Sequence[Step]) -> Key | None:
        """The key that one of the steps made; None where none does."""
        return read_key(self.key, self.passphrase) if any(step.has_key for step in steps) else None

    def check(self, step: Step, source: Path) -> StepReport:
        """A dry run of one step: it refuses what :meth:`write` refuses before the work begins."""
        inputs = self.inputs(step, source, self.out)
        signs = self._require_usable(inputs)
        require_space(self.out, inputs.expert.index.nbytes)
        return self._report(step, inputs, step.protection.check(inputs), self.out, None, signs, is_dry_run=True)

    def _require_usable(self, inputs: Inputs) -> tuple[str, ...]:
        """Refuse what only the open checkpoints show; notes on what they show besides."""
        require_outside(self.out, *folders_read((inputs.expert, inputs.base)))
        if inputs.expert.folder != self.expert:
            return ()  # what an earlier step wrote
        earlier = record_of_steps(self.expert).get(EARLIER_STEPS, [])
        if earlier and "key_fingerprint" in earlier[-1]:
            return (
                f"{self.expert} is a protected release itself: the new key gives it back, and key "
                f"{str(earlier[-1]['key_fingerprint'])[:8]} then the original.",
            )
        return () if earlier else look_at_base(inputs.base, inputs.expert)

    def write(self, step: Step, source: Path, out: Path) -> StepReport:
        inputs = self.inputs(step, source, out)
        signs = self._require_usable(inputs)
        prepared = step.protection.prepare(inputs)
        with kept_key(self.key, prepared.key, self.passphrase, out):
            facts, _ = _write(step.protection, prepared, inputs, out)
        if inputs.work is not None:
            _remove(prepared.leftovers, inputs.work)
        return self._report(step, inputs, facts, out, prepared.key, signs, is_dry_run=False)

    def _report(
        self,
        step: Step,
        inputs: Inputs,
        facts: Facts,
        out: Path,
        key: Key | None,
        signs: Sequence[str],
        *,
        is_dry_run: bool,
    ) -> StepReport:
        repaired = (*inputs.expert.index.notes, *_modules_note(inputs.expert))
        notes = (*signs, *repaired, *facts.notes, step.protection.limits)
        recipes = [protection.recipe() for protection in step.single]
        document: dict[str, Any] = {
            "architecture": inputs.architecture.family,
            **facts.to_json(),
            "dry_run": is_dry_run,
        }
        if step.has_key:
            made = {"key": str(self.key), "key_fingerprint": key.fingerprint if key else None}
            # Several keyed methods may be one step, so theirs are lists.
            document = {**made, "protections": recipes, **document, "notes": list(notes)}
        else:
            document = {**recipes[0], **document, "note": " ".join(notes)}
        return StepReport(step.methods, out, notes, document, facts)

    def result(self, steps: Sequence[Step], reports: Sequence[StepReport], *, is_dry_run: bool) -> ProtectResult:
        return ProtectResult(
            out=self.out,
            base=self.base,
            key=self.key if any(step.has_key for step in steps) else None,
            steps=tuple(reports),
            is_dry_run=is_dry_run,
            attack=steps[-1].protection.attack,
        )


@contextmanager
def kept_key(path: Path, key: Key | None, passphrase: str | None, out: Path) -> Iterator[None]:
    """Inside and afterwards, ``key`` is at ``path``. When what is done there fails for good, it is gone again.

    Another process may be doing the same work with the same file: what it wrote meanwhile keeps its key.
    """
    is_new = key is not None and not os.path.lexists(path)
    if key is not None and is_new:
        write_key(path, key, passphrase)
    elif key is not None and read_key(path, passphrase).fingerprint != key.fingerprint:
        raise KeyFileError(f"key file {path} was made by another process meanwhile; run the same command again.")
    try:
        yield
    except Exception:
        if key is not None and is_new and not partial_of(out).exists() and not _is_key_of(key, out):
            path.unlink(missing_ok=True)  # it opens nothing, and would be in the way of the next try
        raise
    if key is not None and not os.path.lexists(path):
        write_key(path, key, passphrase)


def _is_key_of(key: Key, out: Path) -> bool:
    try:
        manifest = read_manifest(out)
    except CheckpointError:
        return False
    return manifest is not None and manifest.details.get("key_fingerprint") == key.fingerprint


def _modules_note(expert: TensorSource) -> tuple[str, ...]:
    folders = module_folders_of(expert.index.side_files)
    named = ", ".join(folders)
    return (f"{named} stand around the network and are copied as they are, weights included.",) if folders else ()


def require_apart(key: Path, out: Path) -> None:
    """Raises KeyFileError when the key would lie in a folder that is published, or removed."""
    target = key.parent.resolve() / key.name
    for folder in (out, partial_of(out), out.with_name(out.name + _STEPS)):
        place = folder.parent.resolve() / folder.name
        if target == place or place in target.parents:
            raise KeyFileError(
                f"key file {key} would lie inside {folder}, which is published or removed; keep it elsewhere."
            )


def _remove(leftovers: Sequence[Path], work: Path) -> None:
    for path in leftovers:
        path.unlink(missing_ok=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _compose(request: _Request, steps: Sequence[Step], *, is_dry_run: bool) -> ProtectResult:
    """Check every step, do every step, and give the last one's result its place."""
    place = request.out.with_name(request.out.name + _STEPS)
    identity = _identity(request, steps)
    is_begun = scratch.is_begun(place, identity)
    folders = [place / str(number) for number in range(1, len(steps) + 1)]
    if is_begun and not is_dry_run and (finished := _reports_of(request.out, steps)) and not folders[-1].exists():
        logger.warning("%s is complete: an earlier run of this command wrote it", request.out)
        with scratch.begun(place, identity):
            scratch.remove(place)
        return request.result(steps, finished, is_dry_run=False)
    require_absent(request.out)
    reports = [
        request.check(step, source) for step, source, folder in _inputs(request, steps, folders) if not folder.exists()
    ]
    if not is_dry_run:
        with scratch.begun(place, identity):
            reports = _run_all(request, steps, folders)
            _sign(folders[-1], request.key_of(steps))
            require_absent(request.out)
            with writing(request.out):
                folders[-1].rename(request.out)
            sync_folder(request.out.parent)
            scratch.remove(place)
    return request.result(steps, reports, is_dry_run=is_dry_run)


def _reports_of(out: Path, steps: Sequence[Step]) -> list[StepReport]:
    """What the manifest of a whole result of these steps says of each; none if it is no such result."""
    if not out.is_dir() or read_manifest(out) is None or check_files(out):
        return []
    last = _manifest_json(out)
    # The expert may have been a release itself, with steps of its own before these.
    records = [*last.pop(EARLIER_STEPS, []), last][-len(steps) :]
    if [methods_of(record) for record in records] != [step.methods for step in steps]:
        return []
    return [
        StepReport(step.methods, out, (str(record["note"]),), record)
        for step, record in zip(steps, records, strict=True)
    ]


def _run_all(request: _Request, steps: Sequence[Step], folders: Sequence[Path]) -> list[StepReport]:
    reports: list[StepReport] = []
    source = request.expert
    for step, folder in zip(steps, folders, strict=True):
        report = _finished(step, folder) if folder.exists() else request.write(step, source, folder)
        reports.append(replace(report, out=request.out) if folder == folders[-1] else report)
        source = folder
    return reports


def _finished(step: Step, folder: Path) -> StepReport:
    record = _manifest_json(folder)
    return StepReport(step.methods, folder, (str(record["note"]),), record)


def _inputs(request: _Request, steps: Sequence[Step], folders: Sequence[Path]) -> Iterator[tuple[Step, Path, Path]]:
    """What a dry run of each step looks at: what the step before it wrote, or else something of the same shapes."""
    # A LoRA folder is merged by the first step; for the others the base stands in.
    stand_in = request.base if request.expert.is_dir() and is_adapter(request.expert) else request.expert
    for number, (step, folder) in enumerate(zip(steps, folders, strict=True)):
        before = folders[number - 1]
        yield step, request.expert if number == 0 else before if before.exists() else stand_in, folder


def _identity(request: _Request, steps: Sequence[Step]) -> str:
    """What the work below ``OUT.steps`` was begun for."""
    source = open_checkpoint(request.expert, base=request.base, allow_pickle=request.allow_pickle)
    return json.dumps(
        {
            "expert": source.index.headers_digest,
            "base": request.base.resolve(),
            "steps": [[step.methods, step.settings] for step in steps],
            "seed": request.seed,
            **{name: value for name, value in asdict(request.extras).items() if value},
        },
        default=str,
        sort_keys=True,
    )


def _manifest_json(folder: Path) -> dict[str, Any]:
    """What a step's manifest says, but for the files that are gone with it."""
    document = json.loads((folder / MANIFEST_NAME).read_text())
    return {name: value for name, value in document.items() if name not in _OF_THE_FILES}


def _sign(folder: Path, key: Key | None) -> None:
    """Sign the manifest of a composition, whose last step may have had no key."""
    manifest = read_manifest(folder)
    assert manifest is not None, "every step writes one"
    if key is not None:
        signed = replace(manifest, signature=sign(key, manifest.signed_bytes))
        replace_file(folder / MANIFEST_NAME, signed.to_json().encode())


def record_of_steps(folder: Path) -> dict[str, Any]:
    """What the manifest of a protection of ``folder`` says of protections before it; nothing where there are none."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.details.get("kind") != "protected":
        return {}
    record = {name: value for name, value in _manifest_json(folder).items() if name != EARLIER_STEPS}
    return {EARLIER_STEPS: [*earlier_steps(manifest), record]}


def without_files(step: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an earlier step without the lists of files, which every manifest has of its own."""
    return {name: value for name, value in step.items() if name not in ("tool_version", "inputs", "left_out")}
