"""The writing thread: in order, nothing after a failure, and without O_DIRECT where there is none."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmergeable.checkpoint.disk import BLOCK_BYTES, Disk, open_again, open_new, replace_file, write_file
from unmergeable.errors import CheckpointError


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
            with pytest.raises(CheckpointError, match="cannot be written"):
                create(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be written"):
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
    with pytest.raises(CheckpointError, match="disk full"):
        replace_file(path, b"newer")
    assert path.read_bytes() == b"new"
