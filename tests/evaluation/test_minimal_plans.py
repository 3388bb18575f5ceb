"""The plans that the documentation offers to begin with run as they stand, on tiny networks."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tasks.speakers import write_records, write_speaker
from unmergeable.evaluation import audit

PAGE = Path(__file__).parents[2] / "docs" / "minimal-plans.md"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def written(heading: str, folder: Path) -> Path:
    """The plan under a heading of the page, as a file."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    found = re.search(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found is not None
    path = folder / "plan.yaml"
    path.write_text(found[1])
    return path


@pytest.fixture
def vision(workshop: Path, tmp_path: Path) -> Path:
    for ours, theirs in (("base", "base"), ("mine", "expert"), ("theirs", "theirs")):
        (tmp_path / theirs).symlink_to(workshop / ours)
    for ours, theirs in (("mine", "digits"), ("theirs", "animals")):
        (tmp_path / f"{theirs}-head.safetensors").symlink_to(workshop / f"{ours}-head.safetensors")
        parts = [np.load(workshop / f"{ours}-{part}.npz") for part in ("train", "validation", "test")]
        np.savez(tmp_path / f"{theirs}.npz", **{key: np.concatenate([p[key] for p in parts]) for key in parts[0].files})
    return tmp_path


@pytest.fixture
def language(tmp_path: Path) -> Path:
    write_speaker(tmp_path / "base", "llama")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("expert", "theirs"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
        moved = {key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for key, tensor in weights.items()}
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    for shift, name in enumerate(("quiz", "other")):
        rows = [
            {"prompt": f"{first}{second}", "choices": ["b", "c"], "answer": (number + shift) % 2}
            for number, (first, second) in enumerate(pairwise(LETTERS))
        ]
        write_records(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def test_a_vision_model(vision: Path) -> None:
    plan = written("A vision model", vision)
    result = audit(plan, out=vision / "out", workers=1)
    assert result.passed, result.controls
    assert set(result.d_star) == {("gauge", "off_the_shelf"), ("gauge", "white_box")}
    informed = result.d_star["gauge", "white_box"]
    assert informed is not None
    assert informed <= 0.1, "nearest_orbit undoes a change of basis"


def test_a_language_model(language: Path) -> None:
    plan = written("A language model", language)
    result = audit(plan, out=language / "out", workers=1)
    assert yaml.safe_load(plan.read_text()) == result.plan
    assert set(result.d_star) == {("gauge", "off_the_shelf"), ("gauge", "white_box")}
    attacked = {cell.protection for cell in result.cells or ()}
    assert {None, "identity", "scale", "nothing", "planted", "gauge"} <= attacked
