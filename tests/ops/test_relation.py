"""A wrong base, an exchanged one, and a base that is the expert: seen before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmergeable
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.ops.relation import look_at_base
from zoo import TOYS, write_toy


def changed(folder: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def nudged(name: str, tensor: Tensor) -> Tensor:
    return tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_toy(TOYS["gpt2"], tmp_path / "base", seed=0)


def protect(expert: Path, base: Path, **options: object) -> unmergeable.ProtectResult:
    return unmergeable.protect(expert, base=base, out=base.parent / "out", seed=1, **options)  # type: ignore[arg-type]


def test_a_fine_tune_of_the_base_raises_no_doubt(base: Path, tmp_path: Path) -> None:
    expert = changed(base, tmp_path / "expert", nudged)
    assert not any("Warning" in note for note in protect(expert, base).notes)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_base_of_other_weights_is_said(base: Path, tmp_path: Path, dry_run: bool) -> None:
    other = write_toy(TOYS["gpt2"], tmp_path / "other", seed=1)
    (warning,) = (note for note in protect(other, base, dry_run=dry_run).notes if note.startswith("Warning"))
    assert "does not look like a fine-tune of base" in warning
    assert "give the checkpoint it was fine-tuned from" in warning


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_base_that_is_the_expert_is_said(base: Path, tmp_path: Path, dry_run: bool) -> None:
    same = changed(base, tmp_path / "same", lambda name, tensor: tensor)
    (warning,) = (note for note in protect(same, base, dry_run=dry_run).notes if note.startswith("Warning"))
    assert "hold the same weights: there is no fine-tune to protect" in warning


def test_one_changed_number_is_a_fine_tune(base: Path, tmp_path: Path) -> None:
    """What is looked at first is equal then; only a look at everything tells."""
    last = sorted(load_file(base / "model.safetensors"))[-1]

    def change(name: str, tensor: Tensor) -> Tensor:
        if name == last:
            tensor.flatten()[-1] += 1
        return tensor

    expert = changed(base, tmp_path / "expert", change)
    assert look_at_base(Checkpoint.open(base), Checkpoint.open(expert)) == ()


@pytest.mark.parametrize("sign", ["training_args.bin", "README.md"])
def test_signs_that_base_and_expert_were_exchanged(base: Path, tmp_path: Path, sign: str) -> None:
    expert = changed(base, tmp_path / "expert", nudged)
    text = f"---\nlicense: mit\nbase_model: somebody/{base.name}\n---\nMy fine-tune.\n"
    (expert / sign).write_text(text)
    (warning,) = (note for note in protect(base, expert).notes if note.startswith("Warning"))
    assert "exchanged" in warning
    assert not any("Warning" in note for note in protect_the_right_way(expert, base).notes), "the control"


def protect_the_right_way(expert: Path, base: Path) -> unmergeable.ProtectResult:
    return unmergeable.protect(expert, base=base, out=base.parent / "right", seed=1)
