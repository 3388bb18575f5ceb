"""Layers that sentence-transformers keeps around networks: merged where all models have them, else said."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merges.networks_on_disk import close, half_of_each, language_model, merged, notes_of, write
from unmergeable.merges import Linear


def embedder(folder: Path, seed: int, dense: float, width: int = 3) -> Path:
    """A checkpoint with pooling, and a dense layer full of one number."""
    write(folder, language_model(seed))
    listed = [("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in listed]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path, _ in listed:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text("{}")
    save_file({"linear.weight": torch.full((2, width), dense)}, folder / "2_Dense" / "model.safetensors")
    return folder


def dense_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]


def test_layers_that_all_have_are_merged(tmp_path: Path) -> None:
    folders = [embedder(tmp_path / str(seed), seed, float(seed)) for seed in range(3)]
    merged(folders[0], folders[1:], tmp_path / "out")
    zero, one, two = (torch.full((2, 3), float(number)) for number in range(3))
    assert close(dense_of(tmp_path / "out"), half_of_each(zero, one, two))
    assert not notes_of(tmp_path / "out")
    merged(None, folders[1:], tmp_path / "mean", method=Linear())
    assert close(dense_of(tmp_path / "mean"), (one + two) / 2)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"


def test_layers_of_other_shapes_are_the_templates(tmp_path: Path) -> None:
    folders = [embedder(tmp_path / "base", 0, 1.0), embedder(tmp_path / "a", 1, 2.0, width=4)]
    merged(folders[0], folders[1:], tmp_path / "out")
    assert close(dense_of(tmp_path / "out"), torch.ones(2, 3))
    assert "2_Dense/model.safetensors is that of base: it is not merged" in notes_of(tmp_path / "out")


def test_a_base_without_modules_loses_them_and_says_so(tmp_path: Path) -> None:
    base = write(tmp_path / "base", language_model(0))
    experts = [embedder(tmp_path / "a", 1, 2.0), embedder(tmp_path / "b", 2, 3.0)]
    merged(base, experts, tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()
    assert "modules.json, 1_Pooling, 2_Dense of expert 1 are left out" in notes_of(tmp_path / "out")
    merged(base, experts, tmp_path / "kept", template=1)
    assert close(dense_of(tmp_path / "kept"), torch.full((2, 3), 2.0))
