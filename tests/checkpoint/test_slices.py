"""A sample of a tensor is the same from every kind of source, and reads no more of a file than it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.slices import STRETCHES, sample
from unmergeable.checkpoint.source import RenamedSource
from unmergeable.errors import CheckpointError

WEIGHT = torch.arange(7 * 1000, dtype=torch.float32).view(7, 1000)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "config.json").write_text("{}")
    save_file({"other": torch.ones(3), "weight": WEIGHT}, tmp_path / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(tmp_path)


def test_it_begins_and_ends_where_the_tensor_does(checkpoint: Checkpoint) -> None:
    found = sample(checkpoint, "weight", 80)
    assert found.shape == (80,)
    stretches = found.view(STRETCHES, 10)
    assert bool((stretches.diff(dim=1) == 1).all())
    assert (stretches[0, 0], stretches[-1, -1]) == (0, WEIGHT.numel() - 1)
    gaps = stretches[:, 0].diff()
    assert float(gaps.max() - gaps.min()) <= 1


def test_every_source_gives_the_same(checkpoint: Checkpoint) -> None:
    renamed = RenamedSource(checkpoint, {"new": "weight"})
    in_memory = MemorySource({"weight": WEIGHT}, {})
    found = sample(checkpoint, "weight", 100)
    assert torch.equal(sample(renamed, "new", 100), found)
    assert torch.equal(sample(in_memory, "weight", 100), found)


def test_a_small_tensor_is_given_whole(checkpoint: Checkpoint) -> None:
    assert torch.equal(sample(checkpoint, "weight", WEIGHT.numel()), WEIGHT.flatten())
    assert torch.equal(sample(checkpoint, "other", STRETCHES), torch.ones(3))


def test_only_the_sample_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = checkpoint._files.read_into

    def counted(buffer: memoryview, path: Path, offset: int) -> None:
        read.append(len(buffer))
        original(buffer, path, offset)

    monkeypatch.setattr(checkpoint._files, "read_into", counted)
    sample(checkpoint, "weight", 80)
    assert sum(read) == 80 * WEIGHT.itemsize
    read.clear()
    checkpoint.tensor("weight")
    assert sum(read) == WEIGHT.numel() * WEIGHT.itemsize


def test_an_unknown_name_is_said(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="has no tensor 'missing'"):
        sample(checkpoint, "missing", 80)
