"""Folders of sentence-transformers: what stands around the network is part of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from unmergeable.checkpoint.manifest import check_files
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.rewrite import output_like, rewrite

WriteFolder = Callable[..., Path]


def add_modules(folder: Path) -> Path:
    listed = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Other", "Transformer")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in listed]
    modules.append({"path": "../outside", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    for path, _ in listed[1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps({"of": path}))
    for path in ("2_Dense", "3_Other"):
        save_file({"linear.weight": torch.ones(2, 3)}, folder / path / "model.safetensors")
    (folder / "2_Dense" / "training_args.bin").write_bytes(b"")
    return folder


def test_modules_around_the_network_are_copied(tmp_path: Path, single: WriteFolder) -> None:
    source = Checkpoint.open(add_modules(single(tmp_path / "in", {"a.weight": torch.ones(2)})))
    assert list(source.index.side_files) == [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"
    ]  # fmt: skip
    # Another network of its own, and files nobody knows, are not.
    assert [item.name for item in source.index.left_out] == ["2_Dense/training_args.bin", "3_Other/"]
    out = tmp_path / "out"
    rewrite(source, out, output_like(source, {}), manifest={}, resume_token="")
    for name, path in source.index.side_files.items():
        assert (out / name).read_bytes() == path.read_bytes()
    assert check_files(out) == ()


def test_altered_modules_are_noticed(tmp_path: Path, single: WriteFolder) -> None:
    source = Checkpoint.open(add_modules(single(tmp_path / "in", {"a.weight": torch.ones(2)})))
    out = tmp_path / "out"
    rewrite(source, out, output_like(source, {}), manifest={}, resume_token="")
    (out / "1_Pooling" / "config.json").unlink()
    (out / "1_Pooling" / "more.json").write_text("{}")
    dense = load_file(out / "2_Dense" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in dense.items()}, out / "2_Dense" / "model.safetensors")
    found = {(item.name, item.problem) for item in check_files(out)}
    assert found >= {("1_Pooling/config.json", "missing"), ("1_Pooling/more.json", "added")}
    assert "2_Dense/model.safetensors" in {name for name, _ in found}
    assert len(found) == 3


def test_without_a_list_folders_stay_behind(tmp_path: Path, single: WriteFolder) -> None:
    folder = add_modules(single(tmp_path, {"a.weight": torch.ones(2)}))
    (folder / "modules.json").unlink()
    index = Checkpoint.open(folder).index
    assert not index.side_files
    assert "2_Dense/" in [item.name for item in index.left_out]
