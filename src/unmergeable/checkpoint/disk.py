"""Files on the disk: small ones appear whole or not at all, large ones are written by a thread past the page cache.

A small file is written beside its place under a temporary name, synced, and then given its name. Its writer holds a
lock on it meanwhile: what a killed process left is a temporary file without one.

Checkpoints are larger than memory and written once, front to back. Through the page cache each byte is copied,
waits as a dirty page and evicts something useful; large aligned writes with O_DIRECT cost the processor next to
nothing, and the sync at the end finds little to do. (Rewriting 2.3 GB takes 4.1 s of processor time with it and 6.8 s
without.) Where O_DIRECT is not to be had the same writes are made without it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import mmap
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.errors import NEEDS_POSIX, BadInput, CheckpointError, DiskError, UnmergeableError

try:
    import fcntl
except ModuleNotFoundError:
    raise UnmergeableError(NEEDS_POSIX) from None

BLOCK_BYTES = 4 << 20
ALIGNMENT = 4096
"""Memory, offset and length of a direct write are multiples of this; no device in use asks for more."""

_BLOCKS = 4
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # what FAT and some FUSE systems answer
_SWEPT = 4  # leftovers looked for: of so many processes, killed while they wrote the same file at the same time

_SAFELY = os.O_NOFOLLOW | os.O_CLOEXEC

# macOS has no fdatasync.
_datasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def is_disk_failure(error: OSError) -> bool:
    """Whether a write failed because the disk is full or broken, wherever on it the file was to be."""
    return error.errno in (*_FULL, errno.EIO)


def write_error(path: Path, error: OSError) -> DiskError:
    """The one-line error for a failed write."""
    if error.errno in _FULL:
        return DiskError(
            f"disk full while writing {path.name} ({error.strerror}): free space and run the same command again, "
            "it resumes."
        )
    return DiskError(f"{path} cannot be written ({error.strerror}).")


def read_error(path: Path, error: OSError) -> CheckpointError:
    """The one-line error for a failed read."""
    if error.errno == errno.ELOOP:
        return CheckpointError(f"{path} became a link after the folder was listed; run the command again.")
    return CheckpointError(f"{path} cannot be read ({error.strerror}).")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an error of the system becomes a :class:`DiskError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def creating(folder: Path, remedy: str = "name another folder") -> Iterator[None]:
    """Inside, a folder that the user named is created.

    Raises:
        DiskError: the disk is full or has failed.
        BadInput: something else is in the way, with the remedy.
    """
    try:
        yield
    except OSError as error:
        if is_disk_failure(error):
            raise write_error(folder, error) from None
        raise BadInput(f"{folder} cannot be created ({error.strerror}); {remedy}.") from None


def open_to_read(path: Path) -> int:
    """Open a regular file whose path has its links followed already; a link that took its place is refused.

    Raises:
        CheckpointError: when it cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _SAFELY)  # opening a pipe would wait for a writer
    except OSError as error:
        raise read_error(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a regular file; remove it.")
    return descriptor


@contextmanager
def reading(path: Path) -> Iterator[io.BufferedReader]:
    """A file opened by :func:`open_to_read`; errors of reading inside name it.

    Raises:
        CheckpointError: when it cannot be opened or read.
    """
    with os.fdopen(open_to_read(path), "rb") as file:
        try:
            yield file
        except OSError as error:
            raise read_error(path, error) from error


def read_file(path: Path) -> bytes:
    """The bytes of a small file; raises as :func:`reading`."""
    with reading(path) as file:
        return file.read()


@dataclass(frozen=True)
class _Task:
    work: Callable[..., object]
    arguments: tuple[Any, ...]
    even_after_failure: bool = False


class Disk:
    """Runs what it is given in one thread, in order. After a failure it runs nothing more.

    So a note that bytes are safe, submitted after the writes of these bytes, is only ever made if they succeeded.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._unmade = _BLOCKS
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="unmergeable-write", daemon=True)
        self._thread.start()

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, work: Callable[..., object], *arguments: Any) -> None:
        """Queue work; raise what earlier work raised."""
        if self._failure is not None:
            raise self._failure
        self._tasks.put(_Task(work, arguments))

    def block(self) -> memoryview:
        """An aligned buffer of BLOCK_BYTES to fill and hand to :meth:`write`. Waits until one is free."""
        if self._unmade:
            self._unmade -= 1
            return memoryview(mmap.mmap(-1, BLOCK_BYTES))
        return self._free.get()

    def write(self, path: Path, descriptor: int, block: memoryview, nbytes: int, offset: int) -> None:
        """Queue writing the first ``nbytes`` of a block, which then belongs to the disk again."""
        try:
            self.submit(_write_at, path, descriptor, block[:nbytes], offset)
        finally:
            self.recycle(block)

    def write_lent(self, path: Path, descriptor: int, data: memoryview, offset: int) -> None:
        """Queue writing the caller's own memory, which must not change before what is queued behind it has run."""
        self.submit(_write_at, path, descriptor, data, offset)

    def recycle(self, block: memoryview) -> None:
        """Free a block once everything queued before is done with it."""
        self.submit_always(self._free.put, block)

    def submit_always(self, work: Callable[..., object], *arguments: Any) -> None:
        """Queue work that is to run after a failure as well."""
        self._tasks.put(_Task(work, arguments, even_after_failure=True))

    def drain(self) -> None:
        """Wait for everything queued, raising what it raised."""
        reached = threading.Event()
        self.submit_always(reached.set)
        reached.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._failure is None or task.even_after_failure:
                try:
                    task.work(*task.arguments)
                except BaseException as error:
                    self._failure = error


def open_new(path: Path) -> int:
    """Create a file for writing and reading back: it must not exist, a link is not followed, mode 0644 less the umask.

    Raises:
        DiskError: when it cannot be created.
    """
    return _open_direct(path, os.O_CREAT | os.O_EXCL)


def open_again(path: Path) -> int:
    """Open a file that an earlier run began.

    Raises:
        DiskError: when it is not there, or is a link.
    """
    return _open_direct(path, 0)


def write_file(path: Path, data: bytes) -> None:
    """Create a small file with these bytes and bring it to the disk; a killed process leaves all of it or nothing.

    Raises:
        DiskError: when something is at ``path``, or it cannot be written.
    """
    with writing(path):
        create_whole(path, data)


def replace_file(path: Path, data: bytes, *, is_private: bool = False) -> None:
    """Put these bytes at ``path``, in place of a file that may be there: whoever reads sees the old one or the new one.

    A private file is its owner's alone to read and write.

    Raises:
        DiskError: when it cannot be written; what was there stays.
    """
    with writing(path):
        with _written_beside(path, data, is_private=is_private) as temporary:
            temporary.replace(path)
        sync_folder(path.parent)


def create_whole(path: Path, data: bytes, *, is_private: bool = False) -> None:
    """As :func:`write_file`, with the system's own errors; a private file is its owner's alone to read and write.

    Raises:
        FileExistsError: something is at ``path``, be it a dangling link.
        OSError: it cannot be written.
    """
    with _written_beside(path, data, is_private=is_private) as temporary:
        try:
            os.link(temporary, path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, 0o600))
            temporary.replace(path)
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote ``path``; those of living ones stay."""
    for number in range(_SWEPT):
        with suppress(OSError):
            leftover = _temporary(path, number)
            descriptor = os.open(leftover, os.O_RDWR | os.O_NONBLOCK | _SAFELY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                leftover.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def _written_beside(path: Path, data: bytes, *, is_private: bool) -> Iterator[Path]:
    """A temporary file in the folder of ``path`` that holds ``data`` on the disk, and is gone afterwards."""
    remove_leftovers(path)
    temporary, descriptor = _locked_temporary(path, 0o600 if is_private else 0o644)
    try:
        if is_private:
            os.fchmod(descriptor, 0o600)  # a strict umask takes bits from the owner too
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _locked_temporary(path: Path, mode: int) -> tuple[Path, int]:
    """A new file beside ``path`` and its descriptor; more than one where others are writing the same file."""
    for number in itertools.count():
        temporary = _temporary(path, number)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, mode)
        except FileExistsError:
            continue
        with suppress(OSError):  # without locks, leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # somebody took it for a leftover before it was locked
    return temporary, descriptor


def _temporary(path: Path, number: int) -> Path:
    # A hash, because with anything appended the name itself may be too long for the file system.
    name = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    return path.with_name(f".unmergeable-{name}.{number}.tmp")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        DiskError: when the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise write_error(folder, error) from error
    finally:
        os.close(descriptor)


def sync_file(path: Path, descriptor: int) -> None:
    """Wait until what is written is on the disk; ``path`` names it in messages."""
    with writing(path):
        _datasync(descriptor)


def truncate_file(path: Path, descriptor: int, nbytes: int) -> None:
    """Give a file its exact length; ``path`` names it in messages."""
    with writing(path):
        os.ftruncate(descriptor, nbytes)


def _open_direct(path: Path, flags: int) -> int:
    with writing(path):
        try:
            return os.open(path, os.O_RDWR | flags | _SAFELY | _DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some kernels create the file before they find that its file system cannot write directly.
            return os.open(path, os.O_RDWR | flags & ~os.O_EXCL | _SAFELY, 0o644)


def _write_at(path: Path, descriptor: int, data: memoryview, offset: int) -> None:
    with writing(path):
        while data:
            try:
                count = os.pwrite(descriptor, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                    raise
                continue
            if count % ALIGNMENT and count < len(data):
                _leave_direct(descriptor)  # a short write: the rest is no longer aligned
            data, offset = data[count:], offset + count


def _leave_direct(descriptor: int) -> bool:
    """Go through the page cache from now on; False if that was so already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
