"""A network that has nothing a method changes: refused in words, and protected by a method that has something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmergeable
from unmergeable.errors import UnsupportedArchitecture


@pytest.fixture
def convolutions(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an expert without attention."""
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    config = PoolFormerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40], num_labels=3, image_size=64, use_layer_scale=True
    )
    torch.manual_seed(0)
    network = PoolFormerForImageClassification(config)
    folders = tmp_path / "base", tmp_path / "expert"
    for folder in folders:
        network.save_pretrained(folder)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.02 * parameter.std(correction=0) * torch.randn_like(parameter)
    return folders


@pytest.mark.parametrize("is_dry", [True, False])
def test_attention_where_there_is_none(convolutions: tuple[Path, Path], tmp_path: Path, is_dry: bool) -> None:
    base, expert = convolutions
    out = tmp_path / "out"
    with pytest.raises(
        UnsupportedArchitecture, match=r"^mergelock changes nothing in a poolformer network: .* gauge\.$"
    ):
        unmergeable.protect(expert, base=base, out=out, method="mergelock", key=tmp_path / "k", dry_run=is_dry)
    assert not out.exists()
    assert not (tmp_path / "k").exists()


def test_the_way_on_works(convolutions: tuple[Path, Path], tmp_path: Path) -> None:
    base, expert = convolutions
    release, restored = tmp_path / "release", tmp_path / "restored"
    unmergeable.protect(expert, base=base, out=release, method="gauge", key=tmp_path / "k", seed=1)
    unmergeable.restore(release, key=tmp_path / "k", out=restored)
    ours, back, theirs = (load_file(folder / "model.safetensors") for folder in (release, restored, expert))
    assert any(not torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert all(torch.allclose(back[name], tensor) for name, tensor in theirs.items())
