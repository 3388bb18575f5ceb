"""Several shards of one result written at a time, each by threads of its own.

The hash of a file follows its bytes one after another, and a processor hashes slower than a disk writes. Where there
are several shards and processors, each *lane* writes some of them, one after another, and hashes the input files that
it is the first to read. The bytes, the journal and the manifest are those of one lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.checkpoint.pipeline import InputHashes, default_threads
from unmergeable.checkpoint.shards import Journal, Means, Start, Written, first_reads, write_shards
from unmergeable.progress import Progress
from unmergeable.threads import worker_threads

MOST_LANES = 4
"""Four hash 7 GB a second, which is more than most disks write."""


class _Stopped(Exception):
    """Another lane has failed, or the caller was interrupted."""


@dataclass
class _Lane:
    starts: list[Start] = field(default_factory=list)
    inputs: list[Path] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(start.shard.size - start.position for start in self.starts)


def write_in_lanes(
    files: Path, starts: Sequence[Start], hashes: InputHashes, journal: Journal, means: Means, progress: Progress
) -> list[FileRecord]:
    """As :func:`~unmergeable.checkpoint.shards.write_shards`, which does it where one lane is enough.

    ``means`` are those of all lanes together, which are no more than the threads asked for, or the processors.
    """
    left = [start for start in starts if start.finished is None]
    count = min(MOST_LANES, worker_threads(means.threads), len(left))
    if count < 2:
        return write_shards(files, starts, hashes, journal, means, progress)
    lanes = _dealt(left, list(hashes.unfinished), count)
    written = Written(progress, sum(start.position for start in starts), sum(start.shard.size for start in starts))
    stop = Event()

    def advance(nbytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        written.advance(nbytes)

    threads = max(1, (means.threads or default_threads()) // count)
    each = replace(means, threads=threads, memory_budget=means.memory_budget // count)
    own = [hashes.only(lane.inputs) for lane in lanes]
    with ThreadPoolExecutor(count, thread_name_prefix="unmergeable-lane") as pool:
        futures = [
            pool.submit(write_shards, files, lane.starts, part, journal, each, advance=advance)
            for lane, part in zip(lanes, own, strict=True)
        ]
        try:
            wait(futures, return_when="FIRST_EXCEPTION")
        finally:  # after an interrupt too
            stop.set()
            wait(futures)
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, _Stopped)):
        raise error
    for part in own:
        hashes.records.update(part.records)
    found = {record.name: record for future in futures for record in future.result()}
    return [start.finished or found[start.shard.name] for start in starts]


def _dealt(starts: Sequence[Start], inputs: Sequence[Path], count: int) -> list[_Lane]:
    """Every shard to the lane that has least to write, the inputs with the first shard that reads them."""
    lanes = [_Lane() for _ in range(count)]
    reads = first_reads([start.shard for start in starts], inputs)
    for start, read in zip(starts, reads, strict=False):
        lane = min(lanes, key=lambda lane: lane.nbytes)
        lane.starts.append(start)
        lane.inputs += read
    min(lanes, key=lambda lane: lane.nbytes).inputs += reads[-1]
    return lanes
