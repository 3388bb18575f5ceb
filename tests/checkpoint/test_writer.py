"""Files written tensor by tensor: the bytes of ``save_file``, hashed, resumable anywhere."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unmergeable.checkpoint import disk as disk_module
from unmergeable.checkpoint import writer as writer_module
from unmergeable.checkpoint.disk import ALIGNMENT, Disk
from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import TensorSpec, save_file_order
from unmergeable.checkpoint.writer import OutputFile, ShardWriter, sha256_of_start
from unmergeable.errors import CheckpointError, DiskError

BLOCK = 2 * ALIGNMENT


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two pages, so that a few kilobytes cross many of them."""
    monkeypatch.setattr(disk_module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", BLOCK)


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_bytes_equal_those_of_save_file_across_blocks(tmp_path: Path, small_blocks: None) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(97, 101, generator=generator),
        "half": torch.randn(5000, generator=generator).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 7),
        "mask": torch.ones(333, dtype=torch.bool),
        "transposed": torch.randn(31, 77, generator=generator).half().T,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    specs = specs_of(tensors)
    order = save_file_order(specs)

    with ShardWriter(tmp_path / "ours", [(name, specs[name]) for name in order], {"format": "pt"}) as writer:
        for name in order:
            writer.write(name, tensors[name])
        record = writer.finish()

    theirs = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == theirs
    assert (record.name, record.size, record.sha256) == ("ours", len(theirs), hashlib.sha256(theirs).hexdigest())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    spec = TensorSpec("F32", (2,))
    with ShardWriter(tmp_path / "x", [("a", spec), ("b", spec)], None) as writer:
        with pytest.raises(CheckpointError, match="got tensor 'b' where 'a' was announced"):
            writer.write("b", torch.ones(2))
        writer.write("a", torch.ones(2))
        with pytest.raises(CheckpointError, match="'b' was never written"):
            writer.finish()
        with pytest.raises(CheckpointError, match=r"tensor 'b' became BF16\[2\]; it must stay F32\[2\]"):
            writer.write("b", torch.ones(2).bfloat16())
    with ShardWriter(tmp_path / "y", [("a", spec)], None) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(CheckpointError, match="where nothing more was announced"):
            writer.write("a", torch.ones(2))
    with pytest.raises(DiskError, match="cannot be written"):
        ShardWriter(tmp_path / "x", [], None)


def test_a_failed_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)

    def write() -> None:
        with ShardWriter(tmp_path / "x", [("a", TensorSpec("U8", (10 * BLOCK,)))], None) as writer:
            writer.write("a", torch.zeros(10 * BLOCK, dtype=torch.uint8))
            writer.finish()

    with pytest.raises(DiskError, match=r"disk full while writing x .*it resumes"):
        write()


STEPS = st.lists(st.one_of(st.integers(0, 3 * BLOCK), st.sampled_from(["flush", "reopen"])), max_size=12)


def lent_memory(data: bytes, position: int) -> memoryview:
    """The data at an address from which it can be written directly to this offset of a file."""
    begin = position % ALIGNMENT
    memory = memoryview(mmap.mmap(-1, begin + len(data) + 1))[begin : begin + len(data)]
    memory[:] = data
    return memory


def test_lent_memory_is_written_without_a_copy_where_it_lies_right(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(0).randbytes(5 * BLOCK)
    written: list[tuple[int, int]] = []
    write = Disk.write_lent

    def told(disk: Disk, path: Path, descriptor: int, data: memoryview, offset: int) -> None:
        written.append((len(data), offset))
        write(disk, path, descriptor, data, offset)

    monkeypatch.setattr(Disk, "write_lent", told)
    with Disk() as disk:
        file = OutputFile.create(tmp_path / "x", disk)
        file.write(b"header")
        file.write(lent_memory(data, 6), lent=True)
        file.write(lent_memory(data, file.position + 1), lent=True)  # elsewhere
        file.write(lent_memory(data, file.position))  # not lent
        file.write(lent_memory(data[: BLOCK - 1], file.position), lent=True)  # too small to bother
        file.finish(lambda: None)
        disk.drain()
    assert (tmp_path / "x").read_bytes() == b"header" + 3 * data + data[: BLOCK - 1]
    assert written == [(5 * BLOCK - ALIGNMENT, ALIGNMENT)]


@given(STEPS, st.randoms(use_true_random=False), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_sequence_of_writes_flushes_and_resumptions(
    tmp_path: Path, small_blocks: None, steps: list[int | str], source: random.Random, hashed: bool
) -> None:
    """Resumption starts at the last flush; whatever was written behind it is gone, and written again differently."""
    path = tmp_path / "x"
    path.unlink(missing_ok=True)
    expected = safe = b""
    notes: list[int] = []
    disk = Disk()
    file = OutputFile.create(path, disk, hashed=hashed)
    for step in steps:
        if step == "flush":
            safe = expected
            file.flush(lambda position=file.position: notes.append(position))  # type: ignore[misc]
        elif step == "reopen":
            file.abandon()
            disk.close()
            digest = sha256_of_start(path, len(safe), lambda done, total: None)
            assert digest is not None
            assert digest.hexdigest() == hashlib.sha256(safe).hexdigest(), "what was flushed is in the file"
            disk = Disk()
            file = OutputFile.reopen(path, disk, len(safe), digest if hashed else None)
            expected = safe
        else:
            assert isinstance(step, int)
            data = source.randbytes(step)
            if source.random() < 0.5:
                file.write(data)
            else:
                file.write(lent_memory(data, file.position), lent=True)
            expected += data
    position, sha256 = file.position, file.sha256
    file.finish(lambda: notes.append(-1))
    disk.drain()
    disk.close()

    assert path.read_bytes() == expected
    assert position == len(expected)
    assert sha256 == (hashlib.sha256(expected).hexdigest() if hashed else None)
    assert notes[-1] == -1
    assert len(notes) == steps.count("flush") + 1


def test_the_hash_of_a_start(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcdef")
    (tmp_path / "link").symlink_to("x")
    told: list[tuple[int, int]] = []
    digest = sha256_of_start(tmp_path / "x", 4, lambda done, total: told.append((done, total)))
    assert digest is not None
    assert digest.hexdigest() == hashlib.sha256(b"abcd").hexdigest()
    assert told == [(4, 4)]
    for name, nbytes in (("x", 7), ("absent", 1), ("link", 4)):
        assert sha256_of_start(tmp_path / name, nbytes, lambda done, total: None) is None
