"""Tensors of a safetensors folder, read one at a time with positioned reads.

No memory mapping: a mapped file that is truncated or replaced while in use kills the process, and its pages
count as the process's own memory. A positioned read fails with an error that can be named.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

from unmergeable.checkpoint.disk import open_to_read, read_error
from unmergeable.checkpoint.index import CheckpointIndex, read_index
from unmergeable.checkpoint.listing import Listing
from unmergeable.checkpoint.source import Extent, IndexedSource, empty_tensor
from unmergeable.errors import CheckpointError

_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB - 4 KiB at a time


class Checkpoint(IndexedSource):
    """A safetensors folder as a :class:`~unmergeable.checkpoint.source.TensorSource`. Holds its files open."""

    def __init__(self, index: CheckpointIndex) -> None:
        super().__init__(index)
        self._files = OpenFiles()

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | Listing) -> Checkpoint:
        """Index ``folder`` (see :func:`~unmergeable.checkpoint.index.read_index`) and read from it."""
        return cls(read_index(folder))

    def tensor(self, name: str) -> torch.Tensor:
        tensor, view = empty_tensor(self.spec(name))
        extent = self.stored(name)
        self._files.read_into(view, extent.path, extent.begin)
        return tensor

    def stored(self, name: str) -> Extent:
        self.spec(name)
        entry = self._index.entries[name]
        path = self._index.shards[entry.shard].path
        assert path is not None, "an index read from files has files"
        return Extent(path, entry.begin, entry.end)

    def raw_chunks(
        self, name: str, chunk_bytes: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[memoryview]:
        """The tensor's stored bytes in order, from byte ``start`` to ``stop`` of it (None: its end).

        Each piece is valid until the next one is asked for.
        """
        extent = self.stored(name)
        first, end = extent.begin + start, extent.end if stop is None else extent.begin + stop
        buffer = memoryview(bytearray(min(chunk_bytes, end - first)))
        for begin in range(first, end, chunk_bytes):
            piece = buffer[: min(chunk_bytes, end - begin)]
            self._files.read_into(piece, extent.path, begin)
            yield piece

    def close(self) -> None:
        """Close the files. Reading again reopens them."""
        self._files.close()


class OpenFiles:
    """Read-only descriptors by path, opened when first needed and closed with this object."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def read_into(self, buffer: memoryview, path: Path, offset: int) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file at ``path``.

        Raises:
            CheckpointError: when the file cannot be read, or ends early because somebody truncated it meanwhile.
        """
        done = 0
        try:
            descriptor = self._descriptor(path)
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done : done + _READ_BYTES]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{path} became shorter while it was read; start again.")
                done += count
        except OSError as error:
            raise read_error(path, error) from error

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            _close_all(self._descriptors)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = open_to_read(path)
            return self._descriptors[path]


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        _, descriptor = descriptors.popitem()
        os.close(descriptor)
