"""Tensors through memory in order: read ahead, compute beside, hand over in sequence, within a budget of bytes.

    feeder  reads ahead in order
    hasher  follows the bytes of the input
    workers edit what was read and hashed, or make tensors from nothing
    consumer, the caller's thread, takes pieces strictly in order

Copied tensors pass in small pieces through a few reused buffers, so a copy costs no memory however large the
tensor. A changed tensor is whole in memory once; one that is made from nothing is made where it can be written from
without a copy. Reservations are made and released in the same order, so the pipeline cannot wait for itself; a tensor
larger than the whole budget travels alone.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import xxhash

from unmergeable.checkpoint.disk import ALIGNMENT
from unmergeable.checkpoint.dtypes import ITEMSIZE, torch_dtype
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.checkpoint.reader import OpenFiles
from unmergeable.checkpoint.source import Extent, empty_tensor, tensor_bytes
from unmergeable.checkpoint.writer import require_spec
from unmergeable.threads import processors

PIECE_BYTES = 1 << 20
_BUFFERS = 96  # as much read-ahead as hides the reading of one changed tensor of that size


@dataclass(frozen=True)
class Job:
    """How one tensor of the result comes about. ``spec`` is what it must be in the end.

    ``fill`` is given the uninitialised result. Without it, ``extent`` (stored bytes of a tensor of ``stored`` spec) or
    ``read`` (computes one) gives the input; ``edit`` changes it, None passes the bytes on. ``begin`` is the offset of
    the result in its file: what is filled lies in memory so that it can be written from there, unbuffered.
    """

    name: str
    spec: TensorSpec
    stored: TensorSpec
    extent: Extent | None = None
    read: Callable[[], torch.Tensor] | None = None
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None
    fill: Callable[[torch.Tensor], object] | None = None
    begin: int = 0


@dataclass(frozen=True)
class Piece:
    """Bytes of the current tensor; ``last`` ends it. The consumer calls ``release`` when it needs them no more.

    It may do so later and from another thread. A piece that ``is_aligned`` lies as a direct write needs it, to be lent
    to the disk; all others are best released at once, while their memory is in the cache.
    """

    data: memoryview
    last: bool
    release: Callable[[], None]
    is_aligned: bool = False


class InputHashes:
    """XXH3 of whole input files from pieces read in rising order; what nobody reads is read here.

    It tells files apart that differ by accident, at memory's speed; a manifest says no more of what was read than
    which files these were. Not thread-safe: one thread feeds it. ``records`` holds the files that are finished.
    """

    def __init__(self, files: Mapping[Path, str], known: Mapping[Path, FileRecord]) -> None:
        self._names = files
        self._open = OpenFiles()
        self._begun: dict[Path, tuple[xxhash.xxh3_128, int]] = {}
        self.records = dict(known)

    def feed(self, path: Path, begin: int, data: memoryview) -> None:
        """Take note of bytes read at offset ``begin``."""
        if path in self.records or path not in self._names:
            return
        digest, position = self._catch_up(path, begin)
        if position < begin + len(data):
            digest.update(data[position - begin :])
            self._begun[path] = (digest, begin + len(data))

    @property
    def unfinished(self) -> tuple[Path, ...]:
        """The files that are not hashed to their ends."""
        return tuple(path for path in self._names if path not in self.records)

    def only(self, files: Collection[Path]) -> InputHashes:
        """The same for some of the files, for another thread to feed."""
        return InputHashes({path: self._names[path] for path in files}, {})

    def finish(self, path: Path) -> None:
        if path in self.records or path not in self._names:
            return
        digest, size = self._catch_up(path, path.stat().st_size)
        self.records[path] = FileRecord(self._names[path], size, xxh3_128=digest.hexdigest())
        self._begun.pop(path, None)

    def finish_all(self) -> None:
        for path in self._names:
            self.finish(path)

    def _catch_up(self, path: Path, target: int) -> tuple[xxhash.xxh3_128, int]:
        digest, position = self._begun.get(path) or (xxhash.xxh3_128(), 0)
        if position < target:
            buffer = memoryview(bytearray(min(PIECE_BYTES, target - position)))
            while position < target:
                piece = buffer[: min(len(buffer), target - position)]
                self._open.read_into(piece, path, position)
                digest.update(piece)
                position += len(piece)
        self._begun[path] = (digest, position)
        return digest, position


def stream(
    jobs: Sequence[Job], hashes: InputHashes, *, threads: int | None, memory_budget: int
) -> Generator[Piece, None, None]:
    """Run the jobs; yield the bytes of their results in order. Closing the iterator stops the threads.

    Args:
        jobs: in the order of the result.
        hashes: fed with every input byte that is read here, and finished for all its files at the end.
        threads: workers for edits; None for as many as leave each a share of torch's own threads.
        memory_budget: bytes of changed tensors between reading and being written.
    """
    channel = _Channel(memory_budget)
    workers = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="unmergeable-edit")
    hasher = ThreadPoolExecutor(1, thread_name_prefix="unmergeable-hash")
    feeder = _Feeder(channel, hashes, hasher, workers)
    thread = threading.Thread(target=feeder.run, args=(jobs,), name="unmergeable-read", daemon=True)
    thread.start()
    try:
        while (item := channel.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, _Copied):
                give_back = partial(channel.give_back, item.buffer)
                item.hashed.result()
                yield Piece(item.buffer[: item.nbytes], item.last, give_back)
            else:
                view, is_aligned = tensor_bytes(item.result.result()), item.is_aligned
                release = partial(_release, view, channel, item.reserved)
                del item
                yield Piece(view, True, release, is_aligned=is_aligned)
                del view, release
    finally:
        channel.cancel()
        for pool in (hasher, workers):
            pool.shutdown(wait=True, cancel_futures=True)
        thread.join()


def _release(view: memoryview, channel: _Channel, reserved: int) -> None:
    view.release()  # and with it the tensor, before its bytes count as free
    channel.release(reserved)


def default_threads() -> int:
    """As many workers as keep workers times torch's own threads within the processors."""
    return max(1, processors() // torch.get_num_threads())


@dataclass(frozen=True)
class _Copied:
    buffer: memoryview
    nbytes: int
    last: bool
    hashed: Future[None]


@dataclass(frozen=True)
class _Changed:
    result: Future[torch.Tensor]
    reserved: int
    is_aligned: bool


_Item = _Copied | _Changed | BaseException | None
"""What the consumer gets; None ends the stream."""


class _Cancelled(Exception):
    """The consumer has gone."""


class _Channel:
    """The queue from the feeder to the consumer, with the budget and the reused buffers."""

    def __init__(self, budget: int) -> None:
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._budget = budget
        self._reserved = 0
        self._free: deque[memoryview] = deque()
        self._unmade = _BUFFERS
        self._cancelled = False

    def put(self, item: _Item) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> _Item:
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            return self._items.popleft()

    def reserve(self, nbytes: int) -> None:
        self._wait(lambda: self._reserved == 0 or self._reserved + nbytes <= self._budget)
        with self._changed:
            self._reserved += nbytes

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._reserved -= nbytes
            self._changed.notify_all()

    def buffer(self) -> memoryview:
        self._wait(lambda: bool(self._free) or self._unmade > 0)
        with self._changed:
            if self._free:
                return self._free.pop()
            self._unmade -= 1
        return memoryview(bytearray(PIECE_BYTES))

    def give_back(self, buffer: memoryview) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._items.clear()
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or ready())
            if self._cancelled:
                raise _Cancelled


class _Feeder:
    """Reads in the order of the result and hands on: bytes to the hasher and the consumer, tensors to the workers."""

    def __init__(
        self, channel: _Channel, hashes: InputHashes, hasher: ThreadPoolExecutor, workers: ThreadPoolExecutor
    ) -> None:
        self._channel = channel
        self._hashes = hashes
        self._hasher = hasher
        self._workers = workers
        self._files = OpenFiles()

    def run(self, jobs: Sequence[Job]) -> None:
        """The feeder's thread. An error goes to the consumer instead of dying with the thread."""
        last_use = {job.extent.path: number for number, job in enumerate(jobs) if job.extent is not None}
        finished: list[Future[None]] = []
        try:
            if not last_use:  # no job waits for the hash of what it read: the files are hashed beside the work
                finished.append(self._hasher.submit(self._hashes.finish_all))
            for number, job in enumerate(jobs):
                if job.extent is not None and job.edit is None:
                    self._copy(job.extent)
                else:
                    self._change(job)
                if job.extent is not None and last_use[job.extent.path] == number:
                    finished.append(self._hasher.submit(self._hashes.finish, job.extent.path))
            finished.append(self._hasher.submit(self._hashes.finish_all))
            for future in finished:
                future.result()
            self._channel.put(None)
        except _Cancelled:
            pass
        except BaseException as error:
            self._channel.put(error)

    def _copy(self, extent: Extent) -> None:
        position = extent.begin
        while True:
            nbytes = min(PIECE_BYTES, extent.end - position)
            buffer = self._channel.buffer()
            hashed = self._read(buffer[:nbytes], extent.path, position)
            position += nbytes
            self._channel.put(_Copied(buffer, nbytes, position == extent.end, hashed))
            if position == extent.end:
                return

    def _change(self, job: Job) -> None:
        reserved = max(job.stored.nbytes, job.spec.nbytes)
        self._channel.reserve(reserved)
        if job.fill is not None:
            result = self._workers.submit(_fill, job, job.fill)
        elif job.extent is None:
            assert job.read is not None
            result = self._workers.submit(_compute, job, job.read, ())
        else:
            tensor, view = empty_tensor(job.stored)
            hashed = tuple(
                self._read(view[offset : offset + PIECE_BYTES], job.extent.path, job.extent.begin + offset)
                for offset in range(0, len(view), PIECE_BYTES)
            )
            box = [tensor]  # so that the worker can drop the last reference but its own
            del tensor, view
            result = self._workers.submit(_compute, job, box.pop, hashed)
        self._channel.put(_Changed(result, reserved, is_aligned=job.fill is not None))

    def _read(self, buffer: memoryview, path: Path, offset: int) -> Future[None]:
        self._files.read_into(buffer, path, offset)
        return self._hasher.submit(self._hashes.feed, path, offset, buffer)


def _fill(job: Job, fill: Callable[[torch.Tensor], object]) -> torch.Tensor:
    if not job.spec.nbytes:
        return empty_tensor(job.spec)[0]
    # A file may place elements at odd addresses (old ones do); memory never does.
    start = (job.begin - job.begin % ITEMSIZE[job.spec.dtype]) % ALIGNMENT
    # Python's default is shared memory, which has small pages only.
    memory = mmap.mmap(-1, start + job.spec.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memoryview(memory)[start:], dtype=torch_dtype(job.spec.dtype)).reshape(job.spec.shape)
    with torch.no_grad():
        fill(tensor)
    return tensor


def _compute(job: Job, read: Callable[[], torch.Tensor], hashed: Sequence[Future[None]]) -> torch.Tensor:
    for future in hashed:
        future.result()  # the edit may change in place what is still to be hashed
    with torch.no_grad():
        tensor = read()
        if job.edit is not None:
            tensor = job.edit(tensor)
        require_spec(job.name, tensor, job.spec)
        return tensor.cpu().contiguous()
