"""Pickled weights: only on request, only tensors, and equal to the safetensors they become."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.errors import CheckpointError

WriteFolder = Callable[..., Path]
TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3).T,
    "a.weight": torch.ones(4).bfloat16(),
    "scale": torch.tensor(2.0),
    "ids": torch.arange(3),
}


def write_pickles(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, content in files.items():
        torch.save(content, folder / f"{name.replace('_of_', '-of-')}.bin")
    return folder


@pytest.mark.parametrize("is_zip", [True, False], ids=["mapped", "old format"])
def test_rewriting_gives_what_save_file_would(is_zip: bool, tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "source")
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    source = open_checkpoint(folder, allow_pickle=True)

    first = source.tensor("b.weight")
    first.zero_()
    assert first.is_contiguous()
    assert torch.equal(source.tensor("b.weight"), TENSORS["b.weight"]), "a tensor is the caller's own"

    manifest = rewrite(source, tmp_path / "out", output_like(source, {}), manifest={}, resume_token="")
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == save(contiguous, metadata={"format": "pt"})
    assert "pytorch_model.bin" in {file.name for file in manifest.inputs["source"]}


def test_shards_keep_their_number(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    folder = write_pickles(tmp_path / "source")
    torch.save({"a.weight": torch.ones(2)}, folder / names[0])
    torch.save({"b.weight": torch.zeros(2)}, folder / names[1])
    index = {"metadata": {}, "weight_map": {"a.weight": names[0], "b.weight": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = open_checkpoint(folder, allow_pickle=True)

    rewrite(source, tmp_path / "out", output_like(source, {"a.weight": torch.neg}), manifest={}, resume_token="")

    result = open_checkpoint(tmp_path / "out")
    assert list(result.index.shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert torch.equal(result.tensor("a.weight"), -torch.ones(2))
    assert result.index.weights_index_name == "model.safetensors.index.json"

    index["weight_map"]["b.weight"] = "../b.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="do not trust"):
        open_checkpoint(folder, allow_pickle=True)


class Payload:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


CONTENTS: dict[str, tuple[object, str]] = {
    "code": ({"a.weight": Payload()}, "cannot be unpickled safely"),
    "a training checkpoint": ({"state_dict": {"a": torch.ones(1)}}, "holds a dict under 'state_dict'"),
    "a number": ({"epoch": 3}, "holds a int under 'epoch'"),
    "a list": ([torch.ones(1)], "holds a list"),
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "holds a Tensor under 'a'"),
    "quantised": ({"a.qweight": torch.ones(2, dtype=torch.int32)}, "already quantised"),
    "complex": ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128"),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_anything_but_tensors_is_refused(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_pickles(tmp_path / "source", pytorch_model=content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_damaged_pickle(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "source", pytorch_model=TENSORS)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be unpickled safely"):
        open_checkpoint(folder, allow_pickle=True)


def test_permission_is_needed_and_safetensors_come_first(tmp_path: Path, single: WriteFolder) -> None:
    folder = write_pickles(tmp_path / "source", pytorch_model={"a.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(folder, allow_pickle=False)
    with pytest.raises(CheckpointError, match="convert them to safetensors") as caught:
        open_checkpoint(folder)  # where there is no such option
    assert "--allow-pickle" not in str(caught.value)
    single(folder, {"a.weight": torch.zeros(2)})
    source = open_checkpoint(folder, allow_pickle=True)
    assert torch.equal(source.tensor("a.weight"), load_file(folder / "model.safetensors")["a.weight"])
