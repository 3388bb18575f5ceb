"""Shards of a result, written by one process: what a journal vouches for is kept, the rest streams to the disk."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Protocol

from unmergeable.checkpoint.disk import Disk
from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.checkpoint.partial import Done, Safe
from unmergeable.checkpoint.pipeline import InputHashes, Job, Piece, stream
from unmergeable.checkpoint.plan import ShardLayout
from unmergeable.checkpoint.writer import OutputFile, sha256_of_start
from unmergeable.progress import Progress, silent

_SYNC_BYTES = 256 << 20  # at most this much is written again after a kill, plus one tensor


class Journal(Protocol):
    """What is told of everything that is known to be on the disk."""

    def note_safe(self, shard: str, safe: Safe) -> None: ...

    def note_finished(self, record: FileRecord) -> None: ...

    def note_input(self, path: str, record: FileRecord) -> None: ...


class NoJournal:
    """For a process whose work is begun again as a whole."""

    def note_safe(self, shard: str, safe: Safe) -> None: ...

    def note_finished(self, record: FileRecord) -> None: ...

    def note_input(self, path: str, record: FileRecord) -> None: ...


@dataclass(frozen=True)
class Means:
    """How shards are written.

    Attributes:
        checksums: whether every byte read and written is hashed.
        threads: workers for edits and makes; None for processors divided by torch's own threads.
        memory_budget: bytes of changed tensors held between reading and writing.
    """

    checksums: bool
    threads: int | None
    memory_budget: int


@dataclass(frozen=True)
class Start:
    """Where to go on with a shard, and the hash of what is there, if asked for: ``finished`` if it is complete."""

    shard: ShardLayout
    position: int = 0
    digest: hashlib._Hash | None = None
    finished: FileRecord | None = None

    @property
    def jobs(self) -> tuple[Job, ...]:
        return self.shard.jobs[bisect_left(self.shard.begins, self.position) :]


def resumed(files: Path, done: Done, shard: ShardLayout, *, checksums: bool, progress: Progress = silent) -> Start:
    """What the journal vouches for, if the file still holds it.

    With checksums all of it is hashed again rather than believed: the manifest's hashes must be those of the bytes
    that are there, and hashing costs less than writing. Without, lengths must do: a position was noted after its bytes
    were synced.
    """
    path = files / shard.name
    length = path.stat().st_size if path.is_file() else 0
    report = partial(progress, f"checking {shard.name}", unit="bytes")
    finished = done.finished.get(shard.name)
    if finished is not None and finished.size == shard.size == length:
        if not checksums:
            return Start(shard, shard.size, finished=_record(shard, None))
        digest = sha256_of_start(path, shard.size, report)
        if digest is not None and finished.sha256 in (None, digest.hexdigest()):
            return Start(shard, shard.size, finished=_record(shard, digest.hexdigest()))
    safe = done.begun.get(shard.name)
    if safe is not None and safe.position in (*shard.begins, shard.size) and safe.position <= length:
        if not checksums:
            return Start(shard, safe.position)
        digest = sha256_of_start(path, safe.position, report)
        if digest is not None and safe.sha256 in (None, digest.hexdigest()):
            return Start(shard, safe.position, digest)
    return Start(shard)


def _record(shard: ShardLayout, sha256: str | None) -> FileRecord:
    """What the manifest says of a written shard, hashed or not."""
    header_sha256 = hashlib.sha256(shard.header).hexdigest() if sha256 is None else None
    return FileRecord(shard.name, shard.size, sha256, header_sha256)


def write_shards(
    files: Path,
    starts: Sequence[Start],
    hashes: InputHashes,
    journal: Journal,
    means: Means,
    progress: Progress = silent,
    *,
    advance: Callable[[int], object] | None = None,
) -> list[FileRecord]:
    """Write what is left of these shards into ``files``, and hash inputs; the records of all shards.

    ``progress`` receives the bytes written, those of an earlier run first; or ``advance`` how many more they are.
    """
    jobs = [job for start in starts for job in start.jobs]
    if advance is None:
        done, total = sum(start.position for start in starts), sum(start.shard.size for start in starts)
        advance = Written(progress, done, total).advance
    records: list[FileRecord] = []
    inputs = _Inputs(journal, hashes)
    streamed = stream(jobs, hashes, threads=means.threads, memory_budget=means.memory_budget)
    with Disk() as disk, closing(streamed) as pieces:
        for start in starts:
            records.append(
                start.finished or _write_shard(files, start, disk, pieces, journal, advance, checksums=means.checksums)
            )
            inputs.note(disk)
        # Asking for one more waits until every input is hashed to its last byte.
        surplus = next(pieces, None)
        assert surplus is None
        inputs.note(disk)
        disk.drain()
    return records


def _write_shard(
    files: Path,
    start: Start,
    disk: Disk,
    pieces: Iterator[Piece],
    journal: Journal,
    advance: Callable[[int], object],
    *,
    checksums: bool,
) -> FileRecord:
    """Append to one shard what is left; it may still be on its way to the disk on return."""
    path = files / start.shard.name
    if start.position == 0:
        path.unlink(missing_ok=True)
        file = OutputFile.create(path, disk, hashed=checksums)
    else:
        file = OutputFile.reopen(path, disk, start.position, start.digest)
    try:
        if file.position == 0:
            file.write(start.shard.header)
            advance(file.position)
        safe_position = file.position
        for _ in start.jobs:
            for piece in pieces:
                nbytes = len(piece.data)
                try:
                    file.write(piece.data, lent=piece.is_aligned)
                finally:
                    if piece.is_aligned:
                        disk.submit_always(piece.release)
                    else:
                        piece.release()
                advance(nbytes)
                if piece.last:
                    break
            if file.position - safe_position >= _SYNC_BYTES:
                safe_position = file.position
                file.flush(partial(journal.note_safe, path.name, Safe(file.position, file.sha256)))
        record = _record(start.shard, file.sha256)
        file.finish(partial(journal.note_finished, record))
    except BaseException:
        file.abandon()
        raise
    else:
        return record


class _Inputs:
    """Puts the hashes of inputs that were read to the end since the last time in the journal."""

    def __init__(self, journal: Journal, hashes: InputHashes) -> None:
        self._journal, self._hashes = journal, hashes
        self._noted = set(hashes.records)

    def note(self, disk: Disk) -> None:
        for path, record in list(self._hashes.records.items()):
            if path not in self._noted:
                self._noted.add(path)
                disk.submit(self._journal.note_input, str(path), record)


def first_reads(shards: Sequence[ShardLayout], inputs: Sequence[Path]) -> list[list[Path]]:
    """For every shard the inputs that it is the first to read; and in one more list those that none reads."""
    left = dict.fromkeys(inputs)
    found: list[list[Path]] = []
    for shard in shards:
        read = dict.fromkeys(job.extent.path for job in shard.jobs if job.extent is not None)
        found.append([path for path in read if path in left])
        left = {path: None for path in left if path not in read}
    return [*found, list(left)]


class Written:
    """Bytes written so far, told to a progress callback, by one thread at a time."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total
        self._one_at_a_time = Lock()
        self.advance(0)

    def advance(self, nbytes: int) -> None:
        with self._one_at_a_time:
            self._done += nbytes
            self._progress("writing", self._done, self._total, "bytes")
