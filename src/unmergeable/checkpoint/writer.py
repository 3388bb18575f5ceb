"""One safetensors file written front to back, one tensor at a time, hashed as it goes if that is asked for.

``safetensors.save_file`` needs every tensor of a shard at once. A header depends only on names, dtypes and
shapes, so it can go first and the tensors follow as they become ready; the bytes are the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from unmergeable.checkpoint.disk import ALIGNMENT, BLOCK_BYTES, Disk, open_again, open_new, sync_file, truncate_file
from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import TensorSpec, build_header
from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.checkpoint.source import tensor_bytes
from unmergeable.errors import CheckpointError


class OutputFile:
    """An append-only file, with a running SHA-256 or without, written in aligned blocks by a :class:`Disk`.

    ``position`` counts the bytes appended. They are with the disk's thread after :meth:`flush`, and the file has
    its exact length after :meth:`finish`; until then it may end in padding.
    """

    def __init__(self, path: Path, disk: Disk, descriptor: int, digest: hashlib._Hash | None) -> None:
        self.path = path
        self.position = 0
        self._disk = disk
        self._descriptor = descriptor
        self._digest = digest
        self._block = disk.block()
        self._filled = 0

    @classmethod
    def create(cls, path: Path, disk: Disk, *, hashed: bool = True) -> OutputFile:
        """Start a file that must not exist, with a running hash unless ``hashed`` is false.

        Raises:
            CheckpointError: when it cannot be created.
        """
        return cls(path, disk, open_new(path), hashlib.sha256() if hashed else None)

    @classmethod
    def reopen(cls, path: Path, disk: Disk, position: int, digest: hashlib._Hash | None) -> OutputFile:
        """Go on after ``position`` bytes, whose hash is ``digest`` (:func:`sha256_of_start`), or None to do without.

        What lies behind them is cut off: nobody knows how much of it reached the disk.
        """
        file = cls(path, disk, open_again(path), digest)
        tail = position % ALIGNMENT
        try:
            truncate_file(path, file._descriptor, position)
            with path.open("rb") as stored:
                stored.seek(position - tail)
                file._block[:tail] = stored.read(tail)
        except BaseException:
            file.abandon()
            raise
        file._filled, file.position = tail, position
        return file

    def write(self, data: memoryview | bytes, *, lent: bool = False) -> None:
        """Append, and hash if the file has a running hash.

        ``lent`` memory is left alone until the disk is done with what is queued so far. Where it is large, and lies as
        a direct write needs it, it is written without a copy.

        Raises:
            CheckpointError: when the disk is full or failed, by this write or an earlier one.
        """
        view = memoryview(data)
        if self._digest is not None:
            self._digest.update(view)
        if lent and len(view) >= BLOCK_BYTES and (_address(view) - self.position) % ALIGNMENT == 0:
            start = -self.position % ALIGNMENT
            stop = start + (len(view) - start) // ALIGNMENT * ALIGNMENT
            self._copy(view[:start])
            self._next_block()
            self._disk.write_lent(self.path, self._descriptor, view[start:stop], self.position)
            self.position += stop - start
            view = view[stop:]
        self._copy(view)

    @property
    def sha256(self) -> str | None:
        """Hex SHA-256 of everything appended so far; None without a running hash."""
        return None if self._digest is None else self._digest.hexdigest()

    def flush(self, then: Callable[[], object]) -> None:
        """Queue everything appended so far, a sync, and ``then``."""
        self._next_block()
        self._disk.submit(sync_file, self.path, self._descriptor)
        self._disk.submit(then)

    def finish(self, then: Callable[[], object]) -> None:
        """Queue the rest of the file, its exact length, a sync, closing it, and ``then``."""
        self._next_block()
        self._disk.submit(truncate_file, self.path, self._descriptor, self.position)
        self._disk.submit(sync_file, self.path, self._descriptor)
        self._disk.submit(then)
        self.abandon()

    def abandon(self) -> None:
        """Close the file, and free its block, when the disk is done with what is queued."""
        self._disk.submit_always(self._close)
        self._disk.recycle(self._block)

    def _copy(self, view: memoryview) -> None:
        while view:
            count = min(len(view), BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + count] = view[:count]
            self._filled += count
            self.position += count
            view = view[count:]
            if self._filled == BLOCK_BYTES:
                self._next_block()

    def _next_block(self) -> None:
        """Hand over what the block holds. Its unaligned end is written padded, and again with what follows it."""
        full, filled = self._block, self._filled
        tail = filled % ALIGNMENT
        padded = filled - tail + (ALIGNMENT if tail else 0)
        self._block, self._filled = self._disk.block(), tail
        self._block[:tail] = full[filled - tail : filled]
        full[filled:padded] = bytes(padded - filled)
        self._disk.write(self.path, self._descriptor, full, padded, self.position - filled)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sha256_of_start(path: Path, nbytes: int, report: Callable[[int, int], object]) -> hashlib._Hash | None:
    """The running hash of a regular file's first ``nbytes``; None if there are fewer, or no such file.

    ``report`` is called with the bytes hashed so far and ``nbytes``.
    """
    if path.is_symlink() or not path.is_file():
        return None
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    left = nbytes
    with path.open("rb", buffering=0) as file:
        while left > 0 and (count := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            left -= count
            report(nbytes - left, nbytes)
    return digest if left == 0 else None


def _address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


class ShardWriter:
    """Writes the tensors of one file in the announced order; use as a context manager.

    Args:
        path: the file, which must not exist.
        tensors: every name and spec, in data order (:func:`~unmergeable.checkpoint.header.save_file_order` gives
            safetensors' own).
        metadata: the header's ``__metadata__``; None for none.
    """

    def __init__(
        self, path: Path, tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str] | None
    ) -> None:
        self._awaited = list(tensors)[::-1]
        header = build_header(self._awaited[::-1], metadata)
        self._disk = Disk()
        try:
            self._file = OutputFile.create(path, self._disk)
            self._file.write(header)
        except BaseException:
            self._disk.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.abandon()
        self._disk.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor (any strides, on the CPU).

        Raises:
            CheckpointError: when it is not the tensor announced for this place.
        """
        spec = self._next(name)
        require_spec(name, tensor, spec)
        self._file.write(tensor_bytes(tensor))

    def finish(self) -> FileRecord:
        """Flush to the disk and return the file's name, size and hash.

        Raises:
            CheckpointError: when an announced tensor was not written.
        """
        if self._awaited:
            raise CheckpointError(f"{self._file.path.name}: tensor {self._awaited[-1][0]!r} was never written.")
        record = FileRecord(self._file.path.name, self._file.position, self._file.sha256)
        self._file.finish(lambda: None)
        self._disk.drain()
        return record

    def _next(self, name: str) -> TensorSpec:
        if not self._awaited or self._awaited[-1][0] != name:
            expected = repr(self._awaited[-1][0]) if self._awaited else "nothing more"
            raise CheckpointError(f"{self._file.path.name}: got tensor {name!r} where {expected} was announced.")
        return self._awaited.pop()[1]


def require_spec(name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    """Require a tensor to be what the header promises.

    Raises:
        CheckpointError: naming the tensor, what it is and what it must be.
    """
    actual = TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape))
    if actual != spec:
        raise CheckpointError(f"tensor {name!r} became {actual}; it must stay {spec}.")
