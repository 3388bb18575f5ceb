"""One way in, whatever a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unmergeable.checkpoint.open import open_checkpoint, split_adapter
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import CheckpointError

WriteFolder = Callable[..., Path]


def test_a_whole_checkpoint_needs_no_base(two_shards: Path, tmp_path: Path) -> None:
    assert isinstance(open_checkpoint(two_shards), Checkpoint)
    assert isinstance(open_checkpoint(str(two_shards), base=tmp_path / "ignored"), Checkpoint)


def test_an_adapter_needs_its_base(tmp_path: Path, single: WriteFolder) -> None:
    folder = single(tmp_path, {"a": torch.ones(1)})
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(CheckpointError, match="org/base"):
        open_checkpoint(folder)


def test_what_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent", base=tmp_path, allow_pickle=True)


def test_an_adapter_named_with_its_base(tmp_path: Path) -> None:
    assert split_adapter("base+adapter", tmp_path) == (tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "llama+code").mkdir()
    assert split_adapter("llama+code", tmp_path) == (tmp_path / "llama+code", None)
    assert split_adapter("plain", tmp_path) == (tmp_path / "plain", None)
