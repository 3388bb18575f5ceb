"""The writing thread: in order, nothing after a failure, and without O_DIRECT where there is none."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmergeable.checkpoint.disk import (
    BLOCK_BYTES,
    Disk,
    _temporary,
    create_whole,
    open_again,
    open_new,
    open_to_read,
    read_file,
    replace_file,
    write_file,
)
from unmergeable.checkpoint.header import read_header
from unmergeable.checkpoint.manifest import record_file
from unmergeable.errors import CheckpointError, DiskError


def fail() -> None:
    raise CheckpointError("the disk failed")


def test_work_is_done_in_order() -> None:
    done: list[int] = []
    with Disk() as disk:
        for number in range(100):
            disk.submit(done.append, number)
        disk.drain()
        assert done == list(range(100))


def test_nothing_is_done_after_a_failure() -> None:
    """A note that bytes are safe must not follow a write that failed."""
    done: list[str] = []
    with Disk() as disk:
        gate = threading.Event()
        disk.submit(gate.wait)
        disk.submit(fail)
        disk.submit(done.append, "a note")
        disk.submit_always(done.append, "closing a file")
        gate.set()
        with pytest.raises(CheckpointError, match="the disk failed"):
            disk.drain()
        with pytest.raises(CheckpointError, match="the disk failed"):
            disk.submit(done.append, "more work")
    assert done == ["closing a file"]


def test_blocks_come_back_even_after_a_failure(tmp_path: Path) -> None:
    """Waiting for a block must not outlast the thread's failure."""
    path = tmp_path / "x"
    descriptor = open_new(path)
    with Disk() as disk:
        disk.submit(fail)
        for _ in range(20):
            block = disk.block()
            try:
                disk.write(path, descriptor, block, BLOCK_BYTES, 0)
            except CheckpointError:
                continue
    os.close(descriptor)


def without_direct(real: Callable[..., Any]) -> Callable[..., Any]:
    """A file system that refuses O_DIRECT when a file is opened, after creating it, as some kernels do."""

    def opener(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            if flags & os.O_CREAT:
                os.close(real(path, flags & ~os.O_DIRECT, *mode))
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(path, flags, *mode))

    return opener


def refusing_direct_writes(real: Callable[..., Any]) -> Callable[..., Any]:
    """A file system that opens with O_DIRECT but refuses to write so."""
    import fcntl

    def write(descriptor: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(descriptor, data, offset))

    return write


def writing_by_halves(real: Callable[..., Any]) -> Callable[..., Any]:
    """Short writes of odd lengths."""

    def write(descriptor: int, data: Any, offset: int) -> int:
        return int(real(descriptor, bytes(data[: len(data) // 2 + 1]), offset))

    return write


@pytest.mark.parametrize(
    ("name", "spoil"),
    [("open", without_direct), ("pwrite", refusing_direct_writes), ("pwrite", writing_by_halves), ("", None)],
    ids=["open refuses", "write refuses", "short writes", "as it is"],
)
def test_every_file_system_gets_the_same_bytes(
    name: str, spoil: Callable[..., Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil is not None:
        monkeypatch.setattr(os, name, spoil(getattr(os, name)))
    path = tmp_path / "x"
    descriptor = open_new(path)
    with Disk() as disk:
        for number in range(6):
            block = disk.block()
            block[:] = bytes([number]) * BLOCK_BYTES
            disk.write(path, descriptor, block, BLOCK_BYTES, number * BLOCK_BYTES)
        disk.drain()
    os.close(descriptor)
    assert path.read_bytes() == b"".join(bytes([number]) * BLOCK_BYTES for number in range(6))


def test_files_are_created_afresh_with_the_umask_and_never_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("private")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("new")
    for name in ("target", "link", "dangling"):
        for create in (open_new, lambda path: write_file(path, b"x")):
            with pytest.raises(DiskError, match="cannot be written"):
                create(tmp_path / name)
    with pytest.raises(DiskError, match="cannot be written"):
        open_again(tmp_path / "link")
    assert (tmp_path / "target").read_text() == "private"
    assert not (tmp_path / "new").exists()

    umask = os.umask(0o027)
    try:
        os.close(open_new(tmp_path / "a"))
        write_file(tmp_path / "b", b"x")
    finally:
        os.umask(umask)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]


def test_a_file_is_replaced_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.json", b"new")]

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskError, match="disk full"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new"


# Each run is a child that kills itself before the call of a given number; the next run must do the work, and tidy up.
KILLED_AT_EACH_CALL = """
import itertools, os, signal, sys
from pathlib import Path
from unmergeable.checkpoint.disk import create_whole, replace_file
from unmergeable.gauge.key import Key, read_key, write_key

KEY = Key(bytes(32), {"method": "x"})
path, what = Path(sys.argv[1]), sys.argv[2]

def write():
    if what == "key":
        if not path.exists():
            write_key(path, KEY)
        read_key(path)
    elif what == "replace":
        replace_file(path, b"new")
    elif not path.exists():
        create_whole(path, b"new")

def run(fuse):
    child = os.fork()
    if child == 0:
        counter = itertools.count()
        def counted(real):
            def call(*arguments, **keywords):
                if next(counter) == fuse:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **keywords)
            return call
        for name in ("open", "write", "fchmod", "fsync", "link", "replace", "rename", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        write()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

for fuse in itertools.count():
    path.unlink(missing_ok=True)
    if what == "replace":
        path.write_bytes(b"old")
    was_killed = run(fuse)
    if path.exists():
        read_key(path) if what == "key" else sys.exit("torn") if path.read_bytes() not in (b"old", b"new") else None
    if run(-1):
        sys.exit(f"{fuse}: the next run was killed as well")
    left = [name for name in os.listdir(path.parent) if name != path.name]
    if not path.exists() or (left and what != "create"):
        sys.exit(f"{fuse}: {left} left behind")
    if not was_killed:
        print(fuse)
        break
"""


@pytest.mark.parametrize("what", ["key", "replace", "create"])
def test_a_small_file_is_whole_or_not_there_whenever_its_writer_is_killed(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AT_EACH_CALL, str(tmp_path / "x"), what]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 5, "too few calls: the test would show little"


def test_leftovers_are_removed_and_the_file_of_a_living_writer_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    replace_file(tmp_path / "probe", b"")
    living, dead, foreign = _temporary(path, 0), _temporary(path, 1), tmp_path / "precious.tmp"
    for file in (dead, living, foreign):
        file.touch()
    with living.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        replace_file(path, b"new")
        assert not dead.exists()
        assert living.exists()
    replace_file(path, b"newer")  # the control: nobody holds it any more
    assert {file.name for file in tmp_path.iterdir()} == {"x.json", "probe", "precious.tmp"}


@pytest.mark.parametrize("is_private", [True, False])
def test_where_there_are_no_hard_links_a_file_is_created_all_the_same(
    is_private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    create_whole(tmp_path / "x", b"whole", is_private=is_private)
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert not is_private or (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create_whole(tmp_path / "x", b"other")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_file(tmp_path / ("x" * 255), b"whole")
    replace_file(tmp_path / ("x" * 255), b"again")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"again"]


def test_a_file_that_became_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("private key")
    (tmp_path / "listed").symlink_to("private")
    for read in (open_to_read, read_file):
        with pytest.raises(CheckpointError, match="became a link"):
            read(tmp_path / "listed")
    assert read_file(tmp_path / "private") == b"private key"


def test_a_read_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")

    def broken(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", broken)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Input/output error\)"):
        read_file(path)
    monkeypatch.undo()
    if (memory := Path("/proc/self/mem")).exists():  # opens like any file, and has nothing to read at its beginning
        for read in (read_file, record_file, lambda path: read_header(path, "x")):
            with pytest.raises(CheckpointError, match=r"mem cannot be read \(Input/output error\)"):
                read(memory)
