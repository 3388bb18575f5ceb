"""Shards of one result, written by several processes that see the same files.

One process holds the lock and the journal of ``OUT.partial``, deals out the shards, and does everything that is done
once. The others plan the same result from the same files, write a shard each,

    OUT.partial/shares/NUMBER-WORD/SHARD

hash the input files that belong to it, and say the hashes; then the shard is moved to its place and noted. Each attempt
has a folder of its own. A process that was given up for dead and is not (its machine was cut off for a while) goes on
writing where nobody looks. What is begun again is a whole shard; what is noted is only checked, as in any run that
resumes.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmergeable.checkpoint.disk import creating, writing
from unmergeable.checkpoint.index import timeless_digest
from unmergeable.checkpoint.manifest import FileRecord, installed_version
from unmergeable.checkpoint.partial import Done, PartialFolder
from unmergeable.checkpoint.pipeline import InputHashes
from unmergeable.checkpoint.plan import Layout, OutputTensor, ShardLayout, lay_out
from unmergeable.checkpoint.shards import Means, NoJournal, Written, first_reads, resumed, write_shards
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.pools.pool import Call, Pool
from unmergeable.progress import Progress
from unmergeable.threads import one_thread_per_kernel


@dataclass(frozen=True)
class Planned:
    """What a result is written from, and how: the arguments of :func:`~unmergeable.checkpoint.rewrite.rewrite`."""

    source: TensorSource
    tensors: Sequence[OutputTensor]
    config_changes: Mapping[str, Any] | None = None

    def lay_out(self) -> Layout:
        return lay_out(self.source, self.tensors, self.config_changes)


@dataclass(frozen=True)
class SharedPlan:
    """Processes to write shards in, and how they get to know what to write.

    Attributes:
        pool: runs calls there.
        plan: a function that can be imported; it plans the same result in another process.
        arguments: of ``plan``. They travel one by one, so that a secret among them stays small
            (:mod:`unmergeable.pools.ray_pool`).
        threads: workers for edits in each process.
    """

    pool: Pool
    plan: Callable[..., Planned]
    arguments: tuple[Any, ...] = ()
    threads: int = 1


@dataclass(frozen=True)
class _Share:
    """What one call does: write a shard (None: no shard), and hash the input files.

    ``inputs`` are places in the list of the source's files: links may lead to them by other paths there. ``files`` and
    ``folder`` are absolute; ``finished`` is what the journal says of the shard. ``described`` and ``software`` are
    what the other process must find as well.
    """

    shard: str | None
    inputs: tuple[int, ...]
    files: Path
    folder: Path
    finished: FileRecord | None
    described: str
    software: str
    means: Means


@dataclass(frozen=True)
class _Done:
    """``place`` is where the shard was written; None where what is in its place already is right, or there is none."""

    record: FileRecord | None
    place: Path | None
    inputs: Mapping[int, FileRecord]


def write_elsewhere(
    folder: PartialFolder,
    layout: Layout,
    sources: Mapping[str, TensorSource],
    hashes: InputHashes,
    shared: SharedPlan,
    means: Means,
    progress: Progress,
) -> list[FileRecord]:
    """Have all shards written, and all inputs hashed into ``hashes``; the records of the shards.

    Raises:
        BadInput: another machine does not see what this one sees.
        CheckpointError, DiskError: an input cannot be read, or a shard cannot be written.
        UnmergeableError: other versions are installed there, or processes die over the same shard again and again.
    """
    assert list(sources) == ["source"], "the others plan from one source"
    described = _described(sources["source"], layout)
    paths = list(sources["source"].index.tensor_files)
    unread = [path for path in paths if means.checksums and path not in hashes.records]
    shares = [
        _Share(
            shard=None if shard is None else shard.name,
            inputs=tuple(map(paths.index, inputs)),
            files=folder.files,
            folder=folder.shares / str(number),
            finished=None if shard is None else folder.done.finished.get(shard.name),
            described=described,
            software=_software(),
            means=replace(means, threads=shared.threads),
        )
        for number, (shard, inputs) in enumerate(_dealt(layout.shards, unread))
    ]
    with creating(folder.shares):
        folder.shares.mkdir(exist_ok=True)
    calls: list[Call] = [(write_share, (share, shared.plan, *shared.arguments)) for share in shares]
    report = Written(progress, 0, sum(shard.size for shard in layout.shards))
    records: list[FileRecord] = []
    for number, done in shared.pool.run(calls):
        assert isinstance(done, _Done)
        if done.record is not None:
            if done.place is not None:
                with writing(folder.files / done.record.name):
                    done.place.replace(folder.files / done.record.name)
                folder.note_finished(done.record)
            records.append(done.record)
            report.advance(done.record.size)
        for place, record in done.inputs.items():
            hashes.records[paths[place]] = record
            folder.note_input(str(paths[place]), record)
        folder.remove_share(shares[number].folder.name)
    return records


def _dealt(shards: Sequence[ShardLayout], inputs: Sequence[Path]) -> Iterator[tuple[ShardLayout | None, list[Path]]]:
    """Every shard with the inputs that it is the first to read; then the inputs that none reads as they lie there."""
    *read, left = first_reads(shards, inputs)
    yield from zip(shards, read, strict=True)
    yield from ((None, [path]) for path in left)


@one_thread_per_kernel()
def write_share(share: _Share, plan: Callable[..., Planned], *arguments: Any) -> _Done:
    """What the other process does.

    Raises:
        BadInput, UnmergeableError: as :func:`write_elsewhere`.
    """
    here = socket.gethostname()
    if _software() != share.software:
        raise UnmergeableError(f"{here} has {_software()}, this machine {share.software}: install the same on all.")
    planned = plan(*arguments)
    layout = planned.lay_out()
    if _described(planned.source, layout) != share.described:
        raise BadInput(
            f"{here} sees other files than this machine under the same paths: all machines need the same storage."
        )
    files = planned.source.index.tensor_files
    paths = list(files)
    hashes = InputHashes({paths[place]: files[paths[place]] for place in share.inputs}, {})
    done = Done(finished={} if share.finished is None else {share.finished.name: share.finished})
    starts = [
        resumed(share.files, done, shard, checksums=share.means.checksums)
        for shard in layout.shards
        if shard.name == share.shard
    ]
    is_written = any(start.finished is None for start in starts)
    own = _own_folder(share.folder) if is_written else share.files
    (record,) = write_shards(own, starts, hashes, NoJournal(), share.means) or (None,)
    place = own / record.name if is_written and record is not None else None
    return _Done(record, place, {paths.index(path): found for path, found in hashes.records.items()})


def _own_folder(folder: Path) -> Path:
    """A new folder for this attempt; attempts at one share begin with the same name."""
    own = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")
    with writing(own):
        own.mkdir()
    return own


def _software() -> str:
    """What the bytes of a result may depend on besides its plan."""
    return f"unmergeable {installed_version()}, torch {torch.__version__} and numpy {np.__version__}"


def _described(source: TensorSource, layout: Layout) -> str:
    return layout.fingerprint("", [timeless_digest(source.index)])
