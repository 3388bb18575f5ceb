"""Tensors read from files: what safetensors reads, the caller's own, and safe from several threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import CheckpointError

WriteFolder = Callable[..., Path]
# safetensors writes more codes, but checkpoints of 8-bit floats are refused as quantised.
CODES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64")


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=6),
        st.tuples(st.sampled_from(CODES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**32)),
        min_size=1,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_load_of_save_is_the_identity(tmp_path: Path, drawn: dict[str, tuple[str, list[int], int]]) -> None:
    expected = {}
    for name, (code, shape, seed) in drawn.items():
        generator = torch.Generator().manual_seed(seed)
        expected[name] = torch.randint(0, 2, shape, generator=generator).to(torch_dtype(code))
    (tmp_path / "config.json").write_text("{}")
    save_file(expected, tmp_path / "model.safetensors")

    checkpoint = Checkpoint.open(tmp_path)

    assert set(checkpoint.names) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)
        assert b"".join(bytes(piece) for piece in checkpoint.raw_chunks(name, 5)) == bytes(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        )


def test_a_tensor_is_the_callers_own(two_shards: Path) -> None:
    checkpoint = Checkpoint.open(two_shards)
    first = checkpoint.tensor("w00.weight")
    first.zero_()
    assert first.is_contiguous()
    assert checkpoint.tensor("w00.weight").abs().sum() > 0


def test_an_unknown_name(two_shards: Path) -> None:
    checkpoint = Checkpoint.open(two_shards)
    for read in (checkpoint.spec, checkpoint.tensor, checkpoint.stored):
        with pytest.raises(CheckpointError, match=r"has no tensor 'lm_head\.weight'"):
            read("lm_head.weight")


def test_reading_from_several_threads(two_shards: Path) -> None:
    checkpoint = Checkpoint.open(two_shards)
    expected = load_file(two_shards / "model-00001-of-00002.safetensors")
    names = sorted(expected) * 20
    with ThreadPoolExecutor(8) as threads:
        for name, tensor in zip(names, threads.map(checkpoint.tensor, names), strict=True):
            assert torch.equal(tensor, expected[name])


def test_a_file_that_shrinks_while_it_is_read(two_shards: Path) -> None:
    checkpoint = Checkpoint.open(two_shards)
    checkpoint.tensor("w04.weight")
    os.truncate(two_shards / "model-00001-of-00002.safetensors", 2000)
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.tensor("w04.weight")


def test_a_file_that_vanishes(two_shards: Path) -> None:
    checkpoint = Checkpoint.open(two_shards)
    (two_shards / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.tensor("w04.weight")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_files_are_closed_with_the_object(two_shards: Path) -> None:
    def opened() -> int:
        return sum(str(link.resolve()).startswith(str(two_shards)) for link in Path("/proc/self/fd").iterdir())

    checkpoint = Checkpoint.open(two_shards)
    checkpoint.tensor("w00.weight")
    assert opened() == 1
    checkpoint.close()
    assert opened() == 0
    checkpoint.tensor("w00.weight")
    assert opened() == 1
    del checkpoint
    assert opened() == 0
