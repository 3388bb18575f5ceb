"""The one loop that writes checkpoints: validate, stream, verify, manifest, rename.

A plan (:mod:`unmergeable.checkpoint.plan`) lists the tensors of the result in order. One thread reads ahead and
hashes the input, workers compute the tensors that change, the calling thread hashes the output, and one more
brings it to the disk; the bytes in between are bounded. One process writes all shards
(:mod:`unmergeable.checkpoint.shards`), a few at a time (:mod:`unmergeable.checkpoint.lanes`), or several share them
(:mod:`unmergeable.checkpoint.sharing`), which gives the same bytes. Everything happens in ``OUT.partial``
(:mod:`unmergeable.checkpoint.partial`), so that ``OUT`` either does not exist or is complete and verified.

    plan = output_like(source, {"model.norm.weight": double})
    rewrite(source, out, plan, manifest={"recipe": {...}}, resume_token=fingerprint)
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import read_file, sync_folder, write_file
from unmergeable.checkpoint.index import CheckpointIndex
from unmergeable.checkpoint.lanes import write_in_lanes
from unmergeable.checkpoint.listing import MANIFEST_NAME, FileState
from unmergeable.checkpoint.manifest import (
    FileRecord,
    Manifest,
    by_name,
    check_files,
    installed_version,
    read_manifest,
    record_file,
    record_header,
    require_details,
)
from unmergeable.checkpoint.partial import (
    FILES,
    PartialFolder,
    completed_earlier,
    partial_of,
    require_creatable,
    require_outside,
)
from unmergeable.checkpoint.pipeline import InputHashes
from unmergeable.checkpoint.plan import OutputTensor, lay_out, output_like
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.shards import Means, resumed
from unmergeable.checkpoint.sharing import SharedPlan, write_elsewhere
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import CheckpointError, DiskError
from unmergeable.progress import Progress, silent

logger = logging.getLogger(__name__)

__all__ = ["MEMORY_BUDGET", "OutputTensor", "folders_read", "output_like", "require_space", "rewrite"]

MEMORY_BUDGET = 512 << 20
"""Default bytes of changed tensors held between reading and writing."""

_SPARE_DISK = 1 << 20  # manifest, journal and the file system's own needs


def rewrite(
    source: TensorSource,
    out: Path | str,
    plan: Sequence[OutputTensor],
    *,
    manifest: Mapping[str, Any],
    resume_token: str,
    config_changes: Mapping[str, Any] | None = None,
    side_files: Mapping[str, Path | bytes | None] | None = None,
    verify: Callable[[TensorSource], Mapping[str, Any]] | None = None,
    also_read: Mapping[str, TensorSource] | None = None,
    checksums: bool = True,
    is_determined: bool = False,
    sign: Callable[[bytes], Mapping[str, str]] | None = None,
    threads: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    shared: SharedPlan | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Write a new checkpoint folder; it appears complete and verified, or not at all.

    Killed, interrupted or out of disk, it leaves ``OUT.partial``, and the same call resumes there. Killed after the
    result was in its place, the same call verifies it once more, removes what is left of ``OUT.partial`` and returns.
    So it does with a whole result where nothing is left, if that can be told (``is_determined``).

    Args:
        source: gives the layout, the side files, and the tensors that are copied or edited.
        out: the folder to create; its parent must exist.
        plan: the tensors of the result in order, those of one shard together (:func:`output_like`).
        manifest: the caller's part of ``unmergeable.json``; JSON-able, without secrets.
        resume_token: identifies the recipe and key. A partial result with another token is discarded.
        config_changes: merged into ``config.json``, nested objects key by key if they are not
            :class:`~unmergeable.checkpoint.plan.Whole`; None copies it byte for byte.
        side_files: what lies beside the weights that is not the source's: a file to copy, bytes to write, or None to
            leave the source's out.
        verify: called with the written checkpoint before it is renamed; what it returns is added to the manifest
            (its keys win). When it raises, the result is deleted and the error passes through.
        also_read: further checkpoints the edits read, by role; their files are recorded in the manifest.
        checksums: hash every byte written, and tell by a faster hash which files were read. Without, the manifest has
            of the files that hold tensors the sizes and the hashes of their headers, and a resumed run believes what
            its journal says of bytes on the disk.
        is_determined: whether ``manifest`` and the inputs say all that the bytes depend on. With checksums, a result
            that was made of them is then known for what it is.
        sign: makes the manifest's signature from its :attr:`~unmergeable.checkpoint.manifest.Manifest.signed_bytes`.
        threads: workers for edits and makes; None for processors divided by torch's own threads.
        memory_budget: bytes of changed tensors held between reading and writing. A larger tensor travels alone.
        shared: other processes that write the shards, each by itself and with threads and memory of its own; None to
            write them here.
        progress: receives the bytes written, those of an earlier run first.

    Raises:
        BadInput: when ``out`` exists, overlaps an input folder, or is being written by another process.
        CheckpointError: when a file cannot be read, or an edit changes a shape or dtype.
        DiskError: when the disk is full or a file cannot be written.
        UsageError: when plan or manifest are malformed.
    """
    out = Path(out)
    require_creatable(out)
    out = out.parent.resolve() / out.name
    sources = {"source": source, **(also_read or {})}
    require_outside(out, *folders_read(sources.values()))
    require_details(manifest)
    beside = {**source.index.side_files, **(side_files or {})}
    copied = {name: path for name, path in beside.items() if isinstance(path, Path)}
    written_beside = {name: data for name, data in beside.items() if isinstance(data, bytes)}
    layout = lay_out(source, plan, config_changes, side_files=copied, written=written_beside)
    _require_unchanged(sources.values())

    token = layout.fingerprint(resume_token, [member.index.headers_digest for member in sources.values()])
    is_result = partial(_is_result, out, manifest, sources) if checksums and is_determined else lambda: False
    if completed_earlier(out, token, is_result):
        logger.warning("%s is complete: an earlier run of this command wrote it", out)
        _verified(out, verify)
        written = read_manifest(out)
        assert written is not None, "it is written before the folder gets its name"
        return written
    require_space(out, layout.nbytes)
    with PartialFolder(out, token) as folder:
        folder.remove_all_but({shard.name for shard in layout.shards})
        records = [_write_small(folder.files, name, data) for name, data in layout.small_files]
        records += [_write_small(folder.files, name, read_file(path)) for name, path in copied.items()]
        hashes = _input_hashes(folder, sources.values()) if checksums else InputHashes({}, {})
        means = Means(checksums, threads, memory_budget)
        if shared is None:
            starts = [
                resumed(folder.files, folder.done, shard, checksums=checksums, progress=progress)
                for shard in layout.shards
            ]
            records += write_in_lanes(folder.files, starts, hashes, folder, means, progress)
        else:
            records += write_elsewhere(folder, layout, sources, hashes, shared, means, progress)
        sync_folder(folder.files)
        try:
            _require_unchanged(sources.values())
            details = {**manifest, **_verified(folder.files, verify)}
        except Exception:
            # What is wrong or unverified must not be mistaken for a result. An interrupt says nothing of it.
            folder.discard()
            raise
        record = Manifest(
            outputs=by_name(records),
            inputs={
                role: _input_records(member.index, hashes, checksums=checksums) for role, member in sources.items()
            },
            left_out=source.index.left_out,
            details=details,
        )
        record = record if sign is None else replace(record, signature=sign(record.signed_bytes))
        _write_small(folder.files, MANIFEST_NAME, record.to_json().encode())
        folder.commit()
    return record


def _is_result(out: Path, manifest: Mapping[str, Any], sources: Mapping[str, TensorSource]) -> bool:
    """Whether ``out`` is whole and says that it was made in this way, by this version, of files with these hashes."""
    try:
        written = read_manifest(out)
    except CheckpointError:
        return False
    if written is None or written.tool_version != installed_version():
        return False
    wanted = json.loads(json.dumps(manifest))
    if {name: written.details.get(name) for name in wanted} != wanted:
        return False
    inputs = {role: _hashed_records(source.index) for role, source in sources.items()}
    return inputs == written.inputs and not check_files(out)


def _hashed_records(index: CheckpointIndex) -> tuple[FileRecord, ...]:
    hashes = InputHashes(index.tensor_files, {})
    hashes.finish_all()
    return _input_records(index, hashes, checksums=True)


def folders_read(sources: Iterable[TensorSource]) -> Iterator[Path]:
    """Every folder that files of these checkpoints lie in."""
    for source in sources:
        yield source.folder
        for path in (source.index.config_file, *source.index.tensor_files):
            yield path.parent


def require_space(out: Path, nbytes: int) -> None:
    """Refuse an output of so many bytes where the disk has no room for what is still to be written of it.

    Raises:
        DiskError: naming both.
    """
    started = partial_of(out) / FILES
    there = sum(path.stat().st_size for path in started.iterdir()) if started.is_dir() else 0
    needed = nbytes - there + _SPARE_DISK
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise DiskError(
            f"disk too small: {out} takes {needed / 1e9:,.3f} GB more and {out.parent} has {free / 1e9:,.3f} GB free; "
            "free space or choose another disk."
        )


def _require_unchanged(sources: Iterable[TensorSource]) -> None:
    """The headers are believed for as long as nobody touches the files."""
    for source in sources:
        for path, state in source.index.states.items():
            if _state_of(path) != state:
                raise CheckpointError(f"{path} was changed after it was opened: run the command again.")


def _state_of(path: Path) -> FileState | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _input_hashes(folder: PartialFolder, sources: Iterable[TensorSource]) -> InputHashes:
    return InputHashes(
        {path: name for source in sources for path, name in source.index.tensor_files.items()},
        {Path(path): record for path, record in folder.done.inputs.items()},
    )


def _input_records(index: CheckpointIndex, hashes: InputHashes, *, checksums: bool) -> tuple[FileRecord, ...]:
    small = {path: name for name, path in index.side_files.items()} | index.description_files
    if checksums:
        large = [hashes.records[path] for path in index.tensor_files]
    else:
        large = [record_header(shard.path, shard.name) for shard in index.shards.values() if shard.path is not None]
        large += [record_header(path, name) for path, name in index.read_files.items()]
        small |= dict(index.other_files)  # adapters, which are small, and pickles, which have no header
    return by_name([record_file(path, name) for path, name in small.items()] + large)


def _write_small(folder: Path, name: str, data: bytes) -> FileRecord:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    write_file(path, data)
    return FileRecord(name, len(data), hashlib.sha256(data).hexdigest())


def _verified(written: Path, verify: Callable[[TensorSource], Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """Open what was written as anybody would, and let the caller judge it."""
    checkpoint = Checkpoint.open(written)
    try:
        details = {} if verify is None else verify(checkpoint)
        require_details(details)
        return details
    finally:
        checkpoint.close()
