"""One safetensors file written front to back, one tensor at a time, hashed as it goes.

``safetensors.save_file`` needs every tensor of a shard at once. A header depends only on names, dtypes and
shapes, so it can go first and the tensors follow as they become ready; the bytes are the same.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import TensorSpec, build_header
from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.checkpoint.source import tensor_bytes
from unmergeable.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REHASH_BYTES = 1 << 22


class OutputFile:
    """An append-only file with a running SHA-256. Created exclusively, never through a link."""

    def __init__(self, path: Path, descriptor: int, position: int, digest: hashlib._Hash) -> None:
        self.path = path
        self.descriptor = descriptor
        self.position = position
        self._digest = digest

    @classmethod
    def create(cls, path: Path) -> OutputFile:
        """Create ``path``, which must not exist, with mode 0644 less the umask."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(path, error) from error
        return cls(path, descriptor, 0, hashlib.sha256())

    @classmethod
    def reopen(cls, path: Path, position: int, sha256: str) -> OutputFile | None:
        """Go on after ``position`` bytes, if the file still starts with bytes of that hash; None if not.

        What lies behind ``position`` is cut off: nobody knows how much of it reached the disk.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_REHASH_BYTES))
        done = 0
        while done < position:
            count = os.preadv(descriptor, [buffer[: min(len(buffer), position - done)]], done)
            if count == 0:
                break
            digest.update(buffer[:count])
            done += count
        if done < position or digest.hexdigest() != sha256:
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, position)
        os.lseek(descriptor, position, os.SEEK_SET)
        return cls(path, descriptor, position, digest)

    def write(self, data: memoryview | bytes) -> None:
        """Append and hash.

        Raises:
            CheckpointError: when the disk is full or fails.
        """
        self._digest.update(data)
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += os.write(self.descriptor, view[done:])
        except OSError as error:
            raise write_error(self.path, error) from error
        self.position += len(view)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of everything written so far."""
        return self._digest.copy().hexdigest()

    def sync(self) -> None:
        """Wait until everything written before this call is on the disk. May run beside :meth:`write`."""
        try:
            _datasync(self.descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        """Close the file, which does not wait for the disk."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def record(self) -> FileRecord:
        """Name, size and hash of the file as it is now."""
        return FileRecord(self.path.name, self.position, self.sha256)


# macOS has no fdatasync.
_datasync = getattr(os, "fdatasync", os.fsync)


def write_error(path: Path, error: OSError) -> CheckpointError:
    """The one-line error for a failed write."""
    if error.errno in _FULL:
        return CheckpointError(
            f"disk full while writing {path.name} ({error.strerror}): free space and run the same command again, "
            "it resumes."
        )
    return CheckpointError(f"{path} cannot be written ({error.strerror}).")


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
        self._file = OutputFile.create(path)
        self._file.write(header)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor (any strides, on the CPU).

        Raises:
            CheckpointError: when it is not the tensor announced for this place.
        """
        spec = self._next(name)
        require_spec(name, tensor, spec)
        self._file.write(tensor_bytes(tensor))

    def write_raw(self, name: str, chunks: Iterable[memoryview | bytes]) -> None:
        """Append a tensor's stored bytes, piece by piece.

        Raises:
            CheckpointError: when the pieces do not add up to the announced size.
        """
        spec = self._next(name)
        begin = self._file.position
        for chunk in chunks:
            self._file.write(chunk)
        if self._file.position - begin != spec.nbytes:
            raise CheckpointError(
                f"tensor {name!r} came as {self._file.position - begin:,} bytes where {spec} takes {spec.nbytes:,}."
            )

    def finish(self) -> FileRecord:
        """Flush to the disk and return the file's name, size and hash.

        Raises:
            CheckpointError: when an announced tensor was not written.
        """
        if self._awaited:
            raise CheckpointError(f"{self._file.path.name}: tensor {self._awaited[-1][0]!r} was never written.")
        self._file.sync()
        return self._file.record

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
    found = TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape))
    if found != spec:
        raise CheckpointError(f"tensor {name!r} became {found}; it must stay {spec}.")
