"""Faults at the calls by which this process reads or changes the disk, below one folder.

Python's own functions are replaced: those of ``os`` that name or change files, and ``open``, whose files count each
read and write. What a library in another language does by itself passes by.

=======  ==============================================================================================
fault    what happens at the call of its number
=======  ==============================================================================================
kill     SIGKILL before it, among the calls that change the disk
broken   it fails with EIO, once, among all calls
full     it and every later call that takes space fail with ENOSPC, among the calls that take space
=======  ==============================================================================================
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unmergeable.checkpoint import disk

Kind = Literal["kill", "broken", "full"]

TAKE_SPACE = ("write", "pwrite", "fsync", "ftruncate", "link", "mkdir", "symlink", "sendfile")
CHANGE = ("rename", "replace", "unlink", "remove", "rmdir", "fchmod", "chmod")
READ = ("preadv", "read", "scandir", "listdir")


@dataclass
class Faults:
    """One fault to come, in a child that ends after it. ``number`` -1 only counts."""

    folder: Path
    kind: Kind
    number: int
    counted: int = 0
    is_struck: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def install(self) -> None:
        """Replace the functions, for the rest of this process."""
        for name in (*TAKE_SPACE, *CHANGE, *READ):
            setattr(os, name, self._guarded(name, getattr(os, name)))
        disk._datasync = self._guarded("fsync", disk._datasync)
        os.open = self._guarded_open(os.open)
        io.open = builtins.open = self._open_file

    def strike(self, name: str) -> None:
        """A call of ``name`` below the folder is about to be made."""
        takes_space, changes = name in TAKE_SPACE, name in (*TAKE_SPACE, *CHANGE)
        if not {"kill": changes, "broken": True, "full": takes_space}[self.kind]:
            return
        with self._lock:
            number = self.counted
            self.counted += 1
            if number != self.number and not (self.kind == "full" and self.is_struck):
                return
            self.is_struck = True
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.ENOSPC if self.kind == "full" else errno.EIO
        raise OSError(code, os.strerror(code))

    def _guarded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if arguments and self._is_below(arguments[0], keywords.get("dir_fd")):
                self.strike(name)
            return real(*arguments, **keywords)

        return call

    def _guarded_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if self._is_below(path, dir_fd):
                self.strike("mkdir" if flags & os.O_CREAT else "read")
            return real(path, flags, mode, dir_fd=dir_fd)

        return call

    def _open_file(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """``open``, whose files count what is read and written."""
        if not self._is_below(file, None):
            return _real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            self.strike("read" if mode.strip("bt") == "r" else "mkdir")
        raw = _CountedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.faults = self
        if buffering == 0:
            return raw
        if raw.readable() and raw.writable():
            buffered: Any = io.BufferedRandom(raw)
        else:
            buffered = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    def _is_below(self, place: Any, parent: int | None) -> bool:
        try:
            if isinstance(place, int):
                path = _of_descriptor(place)
            else:
                path = (Path.cwd() if parent is None else _of_descriptor(parent)) / os.fsdecode(place)
        except (OSError, TypeError):
            return False
        return self.folder in path.parents


def _of_descriptor(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


_real_open = io.open


class _CountedFile(io.FileIO):
    faults: Faults

    def write(self, data: Any) -> int:
        self.faults.strike("write")
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self.faults.strike("read")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.faults.strike("read")
        return super().readall()
