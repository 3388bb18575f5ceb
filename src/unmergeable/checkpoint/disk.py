"""A thread that writes to the disk, past the page cache where the file system allows it.

Checkpoints are larger than memory and written once, front to back. Through the page cache each byte is copied,
waits as a dirty page and evicts something useful; large aligned writes with O_DIRECT cost the processor next to
nothing, and the sync at the end finds little to do. Where O_DIRECT is not to be had the same writes are made
without it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unmergeable.errors import CheckpointError

BLOCK_BYTES = 4 << 20
ALIGNMENT = 4096
"""Memory, offset and length of a direct write are multiples of this; no device in use asks for more."""

_BLOCKS = 4
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# macOS has no fdatasync.
datasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def write_error(path: Path, error: OSError) -> CheckpointError:
    """The one-line error for a failed write."""
    if error.errno in _FULL:
        return CheckpointError(
            f"disk full while writing {path.name} ({error.strerror}): free space and run the same command again, "
            "it resumes."
        )
    return CheckpointError(f"{path} cannot be written ({error.strerror}).")


class Disk:
    """Runs what it is given in one thread, in order. After a failure it runs nothing more.

    So a note that bytes are safe, submitted after the writes of these bytes, is only ever made if they succeeded.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._unmade = _BLOCKS
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="unmergeable-write", daemon=True)
        self._thread.start()

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Queue work; raise what earlier work raised."""
        if self._failure is not None:
            raise self._failure
        self._work.put((work, arguments))

    def block(self) -> memoryview:
        """An aligned buffer of BLOCK_BYTES, to be handed to :meth:`write`. Waits until one is free."""
        if self._unmade:
            self._unmade -= 1
            return memoryview(mmap.mmap(-1, BLOCK_BYTES))
        return self._free.get()

    def write(self, path: Path, descriptor: int, block: memoryview, nbytes: int, offset: int) -> None:
        """Queue writing the first ``nbytes`` of a block; the block is free again afterwards."""
        try:
            self.submit(_write_at, path, descriptor, block[:nbytes], offset)
        finally:
            self._work.put((self._free.put, (block,)))

    def drain(self) -> None:
        """Wait for everything queued, raising what it raised."""
        reached = threading.Event()
        self._work.put((reached.set, ()))
        reached.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, arguments = item
            is_bookkeeping = work in (self._free.put,) or getattr(work, "__func__", None) is threading.Event.set
            if self._failure is not None and not is_bookkeeping:
                continue
            try:
                work(*arguments)
            except BaseException as error:
                self._failure = error
