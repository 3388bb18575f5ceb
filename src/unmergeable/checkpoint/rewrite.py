"""The one loop that writes checkpoints: validate, stream, verify, manifest, rename.

A plan lists the tensors of the result in order. One thread reads ahead and hashes the input, workers compute the
tensors that change, and the calling thread hashes and writes them in order; the bytes between reading and
writing are bounded. Everything happens in ``OUT.partial`` (see :mod:`unmergeable.checkpoint.partial`), so that
``OUT`` either does not exist or is complete and verified.

    plan = output_like(source, {"model.norm.weight": double})
    rewrite(source, out, plan, manifest={"recipe": {...}}, resume_token=fingerprint)
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from unmergeable.checkpoint.disk import Disk, write_file
from unmergeable.checkpoint.header import TensorSpec, build_header, raw_header
from unmergeable.checkpoint.index import CheckpointIndex, require_shard_name, state_of
from unmergeable.checkpoint.manifest import FileRecord, Manifest, by_name, record_file, require_details
from unmergeable.checkpoint.partial import PartialFolder, Safe, require_absent, sync_folder
from unmergeable.checkpoint.pipeline import InputHashes, Job, Piece, stream
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.side_files import CONFIG_NAME, MANIFEST_NAME
from unmergeable.checkpoint.source import StoredSource, TensorSource
from unmergeable.checkpoint.writer import OutputFile, sha256_of_start
from unmergeable.errors import BadInput, CheckpointError, UsageError
from unmergeable.progress import Progress, silent

logger = logging.getLogger(__name__)

MEMORY_BUDGET = 512 << 20
"""Bytes of tensors between reading and writing, unless told otherwise."""

_SYNC_BYTES = 256 << 20  # at most this much is written again after a kill, plus one tensor
_SPARE_DISK = 1 << 20  # manifest, journal and the file system's own needs


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result, in the file ``shard``.

    ``edit`` is given the source's tensor ``origin`` (its own to change in place) and returns the result; ``make``
    is given nothing and may read whatever it likes; with neither, the bytes of ``origin`` are copied unchanged.
    ``origin`` is ``name`` unless the tensor is renamed. Both run in worker threads.
    """

    name: str
    spec: TensorSpec
    shard: str
    make: Callable[[], torch.Tensor] | None = None
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None
    origin: str | None = None


def output_like(
    source: TensorSource,
    edits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    *,
    drop: Collection[str] = (),
    extra: Sequence[OutputTensor] = (),
) -> tuple[OutputTensor, ...]:
    """The plan of a result with the source's names, specs, shards and order.

    Args:
        source: what is copied.
        edits: by tensor name, a function from the stored tensor (its own, to change in place if it likes) to one
            of the same shape and dtype.
        drop: tensors to leave out.
        extra: tensors to add, each at the end of its shard.

    Raises:
        CheckpointError: when ``edits`` or ``drop`` name a tensor the source does not hold.
    """
    for name in (*edits, *drop):
        source.spec(name)
    kept = [
        OutputTensor(name, entry.spec, entry.shard, edit=edits.get(name))
        for name, entry in source.index.entries.items()
        if name not in drop
    ]
    shards = dict.fromkeys(tensor.shard for tensor in (*kept, *extra))
    return tuple(tensor for shard in shards for tensor in (*kept, *extra) if tensor.shard == shard)


def rewrite(
    source: TensorSource,
    out: Path | str,
    plan: Sequence[OutputTensor],
    *,
    manifest: Mapping[str, Any],
    resume_token: str,
    config_changes: Mapping[str, Any] | None = None,
    verify: Callable[[TensorSource], Mapping[str, Any]] | None = None,
    also_read: Mapping[str, TensorSource] | None = None,
    threads: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress = silent,
) -> Manifest:
    """Write a new checkpoint folder; it appears complete and verified, or not at all.

    Killed, interrupted or out of disk, it leaves ``OUT.partial``, and the same call resumes there.

    Args:
        source: gives the layout, the side files, and the tensors that are copied or edited.
        out: the folder to create; its parent must exist.
        plan: the tensors of the result in order, those of one shard together (:func:`output_like`).
        manifest: the caller's part of ``unmergeable.json``; JSON-able, without secrets.
        resume_token: identifies the recipe and key. A partial result with another token is discarded.
        config_changes: merged into ``config.json``, nested objects key by key; None copies it byte for byte.
        verify: called with the written checkpoint before it is renamed; what it returns is added to the manifest
            (its keys win). When it raises, the result is deleted and the error passes through.
        also_read: further checkpoints the edits read, by role; their files are hashed into the manifest.
        threads: workers for edits and makes; None for processors divided by torch's own threads.
        memory_budget: bytes of changed tensors held between reading and writing. A larger tensor travels alone.
        progress: told of bytes written.

    Raises:
        BadInput: when ``out`` exists, overlaps an input folder, or is being written by another process.
        CheckpointError: when a file cannot be read or written, or an edit changes a shape or dtype.
        UsageError: when plan or manifest are malformed.
    """
    out = _absolute(Path(out))
    sources = {"source": source, **(also_read or {})}
    require_absent(out)
    _require_apart(out, sources.values())
    require_details(manifest)
    layout = _lay_out(source, tuple(plan), config_changes)
    _require_space(out, layout.nbytes)
    inputs = {role: _input_files(member.index) for role, member in sources.items()}
    before = {path: state_of(path) for files in inputs.values() for path in files}

    token = _fingerprint(resume_token, [member.index.headers_digest for member in sources.values()], layout)
    with PartialFolder(out, token) as folder:
        records = [_write_small(folder.files / name, data) for name, data in layout.small_files]
        records += [_write_small(folder.files / path.name, path.read_bytes()) for path in source.index.side_files]
        hashes = InputHashes(
            {path: name for files in inputs.values() for path, name in files.items()},
            {Path(path): record for path, record in folder.done.inputs.items()},
        )
        records += _write_shards(folder, layout, hashes, threads, memory_budget, progress)
        _require_unchanged(before)
        sync_folder(folder.files)
        details = dict(manifest)
        if verify is not None:
            details |= _verified(folder, verify)
        record = Manifest(
            outputs=by_name(records),
            inputs={role: by_name([hashes.records[path] for path in files]) for role, files in inputs.items()},
            left_out=source.index.left_out,
            details=details,
        )
        _write_small(folder.files / MANIFEST_NAME, record.to_json().encode())
        folder.commit()
    return record


@dataclass(frozen=True)
class _ShardLayout:
    """One file of the result: its first bytes, and the jobs with the offset at which each one's bytes begin."""

    name: str
    header: bytes
    jobs: tuple[Job, ...]
    begins: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class _Layout:
    shards: tuple[_ShardLayout, ...]
    small_files: tuple[tuple[str, bytes], ...]
    nbytes: int


def _lay_out(source: TensorSource, plan: tuple[OutputTensor, ...], config_changes: Mapping[str, Any] | None) -> _Layout:
    _require_valid(source, plan)
    shards = tuple(
        _lay_out_shard(source, name, tuple(tensors)) for name, tensors in groupby(plan, key=lambda tensor: tensor.shard)
    )
    config = source.index.config_file.read_bytes()
    small = [(CONFIG_NAME, config if config_changes is None else edit_json(config, config_changes))]
    weights_index = _weights_index(source.index, plan)
    if weights_index is not None:
        small.append(weights_index)
    copied = sum(path.stat().st_size for path in source.index.side_files)
    nbytes = sum(shard.size for shard in shards) + sum(len(data) for _, data in small) + copied
    return _Layout(shards, tuple(small), nbytes)


def _require_valid(source: TensorSource, plan: tuple[OutputTensor, ...]) -> None:
    if not plan:
        raise UsageError("the plan of the result is empty: nothing to write.")
    names: set[str] = set()
    for tensor in plan:
        if tensor.name in names:
            raise UsageError(f"the plan holds tensor {tensor.name!r} twice.")
        names.add(tensor.name)
        if tensor.make is not None and (tensor.edit is not None or tensor.origin is not None):
            raise UsageError(f"the plan makes tensor {tensor.name!r} from nothing and from the source at once.")
        if tensor.make is None:
            stored = source.spec(tensor.origin or tensor.name)
            if tensor.edit is None and stored != tensor.spec:
                raise UsageError(f"the plan copies tensor {tensor.name!r} as {tensor.spec}, but it is {stored}.")
    shards = [shard for shard, _ in groupby(plan, key=lambda tensor: tensor.shard)]
    for shard in shards:
        require_shard_name(shard, "the plan")
        if shards.count(shard) > 1:
            raise UsageError(f"the plan scatters the tensors of {shard}: list them together.")


def _lay_out_shard(source: TensorSource, name: str, tensors: tuple[OutputTensor, ...]) -> _ShardLayout:
    specs = [(tensor.name, tensor.spec) for tensor in tensors]
    shard = source.index.shards.get(name)
    if (
        shard is not None
        and shard.path is not None
        and specs == [(member, source.index.entries[member].spec) for member in shard.tensors]
    ):
        # The stored header, not an equal one: another writer's spacing and key order survive.
        header = raw_header(shard.path, shard.header_bytes)
    else:
        header = build_header(specs, {"format": "pt"} if shard is None else shard.metadata)
    begins = []
    position = len(header)
    for _, spec in specs:
        begins.append(position)
        position += spec.nbytes
    return _ShardLayout(name, header, tuple(_job(source, tensor) for tensor in tensors), tuple(begins), position)


def _job(source: TensorSource, tensor: OutputTensor) -> Job:
    if tensor.make is not None:
        return Job(tensor.name, tensor.spec, tensor.spec, read=tensor.make)
    origin = tensor.origin or tensor.name
    stored = source.spec(origin)
    extent = source.stored(origin) if isinstance(source, StoredSource) else None
    if extent is not None:
        return Job(tensor.name, tensor.spec, stored, extent=extent, edit=tensor.edit)
    return Job(tensor.name, tensor.spec, stored, read=lambda: source.tensor(origin), edit=tensor.edit)


def _weights_index(index: CheckpointIndex, plan: tuple[OutputTensor, ...]) -> tuple[str, bytes] | None:
    """Name and bytes of ``*.safetensors.index.json``: the source's own while it still tells the truth."""
    weight_map = {tensor.name: tensor.shard for tensor in plan}
    shards = dict.fromkeys(weight_map.values())
    if index.weights_index_file is None and len(shards) == 1:
        return None
    specs = {tensor.name: tensor.spec for tensor in plan}
    if index.weights_index_file is not None and (specs, weight_map) == (
        {name: entry.spec for name, entry in index.entries.items()},
        {name: entry.shard for name, entry in index.entries.items()},
    ):
        return index.weights_index_file.name, index.weights_index_file.read_bytes()
    metadata = dict((index.weights_index or {}).get("metadata") or {})
    if index.weights_index_file is None or "total_parameters" in metadata:
        metadata["total_parameters"] = sum(spec.numel for spec in specs.values())
    metadata["total_size"] = sum(spec.nbytes for spec in specs.values())
    name = index.weights_index_name or _stem(next(iter(shards))) + ".safetensors.index.json"
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return name, text.encode()


def _stem(shard: str) -> str:
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", shard)


def edit_json(text: bytes, changes: Mapping[str, Any]) -> bytes:
    """Change a JSON object and keep the rest: order of keys, indentation, final newline.

    Nested mappings are merged key by key; any other value replaces what was there.
    """
    original = text.decode()
    indent = re.match(r"\{\s*\n([ \t]*)", original)
    merged = _merged(json.loads(original), changes)
    edited = json.dumps(merged, indent=indent.group(1) if indent else None, ensure_ascii=original.isascii())
    return (edited + original[len(original.rstrip()) :]).encode()


def _merged(old: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged


def _absolute(out: Path) -> Path:
    if out.name in ("", "..") or not out.parent.is_dir():
        raise BadInput(f"{out} cannot be created: its parent folder {out.parent} does not exist; create it first.")
    return out.parent.resolve() / out.name


def _require_apart(out: Path, sources: Collection[TensorSource]) -> None:
    for source in sources:
        folder = source.folder.resolve()
        if out == folder or folder in out.parents or out in folder.parents:
            raise BadInput(f"{out} and the input {source.folder} lie inside each other: choose another output folder.")


def _require_space(out: Path, nbytes: int) -> None:
    started = out.with_name(out.name + ".partial") / "checkpoint"
    there = sum(path.stat().st_size for path in started.iterdir()) if started.is_dir() else 0
    needed = nbytes - there + _SPARE_DISK
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise CheckpointError(
            f"disk too small: {out} takes {needed / 1e9:,.1f} GB more and {out.parent} has {free / 1e9:,.1f} GB free."
        )


def _input_files(index: CheckpointIndex) -> dict[Path, str]:
    """Every file the result depends on, with the name to record."""
    files = {shard.path: shard.name for shard in index.shards.values() if shard.path is not None}
    files[index.config_file] = CONFIG_NAME
    if index.weights_index_file is not None:
        files[index.weights_index_file] = index.weights_index_file.name
    return files | {path: path.name for path in index.side_files} | dict(index.other_files)


def _require_unchanged(before: Mapping[Path, tuple[int, int] | None]) -> None:
    for path, state in before.items():
        if state_of(path) != state:
            raise CheckpointError(f"{path} was changed while it was read: run the command again.")


def _fingerprint(resume_token: str, headers_digests: Sequence[str], layout: _Layout) -> str:
    digest = hashlib.sha256(json.dumps([resume_token, headers_digests]).encode())
    for shard in layout.shards:
        digest.update(json.dumps(shard.name).encode() + shard.header)
        for job in shard.jobs:
            kind = "copy" if job.edit is None and job.extent is not None else "compute"
            digest.update(json.dumps([job.name, kind]).encode())
    return digest.hexdigest()


def _write_small(path: Path, data: bytes) -> FileRecord:
    """Write a small file whole, replacing what an earlier run left."""
    path.unlink(missing_ok=True)
    write_file(path, data)
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def _verified(folder: PartialFolder, verify: Callable[[TensorSource], Mapping[str, Any]]) -> Mapping[str, Any]:
    written = Checkpoint.open(folder.files)
    try:
        found = verify(written)
        require_details(found)
    except Exception:
        # An unverified checkpoint must not be mistaken for a result. An interrupt, in contrast, says nothing of it.
        folder.discard()
        raise
    else:
        return found
    finally:
        written.close()


@dataclass(frozen=True)
class _Start:
    """Where to go on with a shard, and the hash of what is there: ``finished`` if it is complete."""

    shard: _ShardLayout
    position: int = 0
    digest: hashlib._Hash | None = None
    finished: FileRecord | None = None

    @property
    def jobs(self) -> tuple[Job, ...]:
        """What is left to do."""
        return self.shard.jobs[bisect_left(self.shard.begins, self.position) :]


def _resume(folder: PartialFolder, shard: _ShardLayout) -> _Start:
    """What the journal vouches for, if the file still holds it.

    Finished shards are hashed again rather than believed: the manifest's hashes must be those of the bytes that
    are there, and hashing costs less than writing.
    """
    path = folder.files / shard.name
    finished = folder.done.finished.get(shard.name)
    if finished is not None and finished.size == shard.size and path.is_file() and record_file(path) == finished:
        return _Start(shard, shard.size, finished=finished)
    safe = folder.done.begun.get(shard.name)
    if safe is not None and safe.position in (*shard.begins, shard.size):
        digest = sha256_of_start(path, safe.position)
        if digest is not None and digest.hexdigest() == safe.sha256:
            return _Start(shard, safe.position, digest)
    path.unlink(missing_ok=True)
    return _Start(shard)


def _write_shards(
    folder: PartialFolder,
    layout: _Layout,
    hashes: InputHashes,
    threads: int | None,
    memory_budget: int,
    progress: Progress,
) -> list[FileRecord]:
    """Write what the journal does not vouch for; return the records of all shards."""
    starts = [_resume(folder, shard) for shard in layout.shards]
    jobs = [job for start in starts for job in start.jobs]
    report = _Report(progress, sum(start.position for start in starts), sum(shard.size for shard in layout.shards))
    records: list[FileRecord] = []
    with Disk() as disk, closing(stream(jobs, hashes, threads=threads, memory_budget=memory_budget)) as pieces:
        for start in starts:
            records.append(start.finished or _write_shard(folder, start, disk, pieces, report))
            _note_inputs(folder, hashes, disk)
        # The pieces end when every input is hashed to its last byte.
        assert next(pieces, None) is None
        _note_inputs(folder, hashes, disk)
        disk.drain()
    return records


def _write_shard(
    folder: PartialFolder, start: _Start, disk: Disk, pieces: Iterator[Piece], report: _Report
) -> FileRecord:
    """Append to one shard what is left; it may still be on its way to the disk on return."""
    path = folder.files / start.shard.name
    if start.digest is None:
        file = OutputFile.create(path, disk)
    else:
        file = OutputFile.reopen(path, disk, start.position, start.digest)
    try:
        if file.position == 0:
            file.write(start.shard.header)
            report.advance(file.position)
        safe_position = file.position
        for _ in start.jobs:
            for piece in pieces:
                file.write(piece.data)
                report.advance(len(piece.data))
                if piece.last:
                    break
            if file.position - safe_position >= _SYNC_BYTES:
                safe_position = file.position
                file.flush(partial(folder.note_safe, path.name, Safe(file.position, file.sha256)))
        record = file.record
        file.finish(partial(folder.note_finished, record))
    except BaseException:
        file.abandon()
        raise
    else:
        return record


def _note_inputs(folder: PartialFolder, hashes: InputHashes, disk: Disk) -> None:
    """Put the hashes of inputs that were read to the end since the last call in the journal."""
    for path, record in list(hashes.records.items()):
        if str(path) not in folder.done.inputs:
            folder.done.inputs[str(path)] = record
            disk.submit(folder.note_input, str(path), record)


class _Report:
    """Bytes of the result that are done, told to a progress callback."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total
        self.advance(0)

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress("writing", self._done, self._total, "bytes")
