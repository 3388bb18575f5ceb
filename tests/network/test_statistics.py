"""Statistics are written as a folder that reads like a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import CheckpointError
from unmergeable.network.statistics import write_statistics


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = {"b.weight/1": torch.arange(9.0).reshape(3, 3), "a": torch.tensor(2.0)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    digest = write_statistics(tmp_path / "s", shapes, sorted(tensors.items()), facts={"data": "digits"})
    assert digest == hashlib.sha256((tmp_path / "s" / "model.safetensors").read_bytes()).hexdigest()
    source = open_checkpoint(tmp_path / "s")
    assert sorted(source.names) == ["a", "b.weight/1"]
    assert all(torch.equal(source.tensor(name), tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "s" / "config.json").read_text()) == {"data": "digits"}


def test_tensors_that_were_not_announced_are_refused_and_the_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was announced"):
        write_statistics(tmp_path / "s", {"a": (1,)}, [("b", torch.zeros(1))], facts={})
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "s")
