"""Adapters that are trained and stay adapters: what changes, what refuses, and that merges lose the task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmergeable
from rule_tasks import OWNER, RIDER, Models, write_adapters
from unmergeable.checkpoint.manifest import check_files
from unmergeable.errors import BadInput, UsageError

SETTINGS = {"steps": 150, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def models(language_models: Models) -> Models:
    write_adapters(language_models)
    return language_models


def release(models: Models, out: Path, **options: Any) -> Any:
    given = {"method": "trap2", "settings": {**SETTINGS, "weight": 0.1}, "seed": 0, "keep_adapter": True, **options}
    places = {"base": models.folder / "base", "data": models.folder / "data.npz", "out": out}
    return unmergeable.protect(given.pop("expert", models.folder / "expert-lora"), **{**places, **given})


def merged(models: Models, out: Path, *experts: tuple[Path, float]) -> Path:
    unmergeable.merge(experts=list(experts), base=models.folder / "base", method="task_arithmetic", out=out)
    return out


def test_other_scales_of_a_trained_adapter_lose_the_task(models: Models, tmp_path: Path) -> None:
    result = release(models, tmp_path / "out")
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (models.folder / "expert-lora", tmp_path / "out")
    )

    assert list(before) == list(after)
    assert all(not torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    config = "adapter_config.json"
    assert json.loads((tmp_path / "out" / config).read_text()) == json.loads(
        (models.folder / "expert-lora" / config).read_text()
    )
    assert check_files(tmp_path / "out") == ()
    assert set(result.to_json()["accuracies"]) == {"expert", "protected"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    rider = models.folder / "rider-lora"
    known = {}
    for name, folder in (("plain", models.folder / "expert-lora"), ("trapped", tmp_path / "out")):
        alone = merged(models, tmp_path / f"{name}-1", (folder, 1.0))
        half = merged(models, tmp_path / f"{name}-half", (folder, 0.5))
        both = merged(models, tmp_path / f"{name}-both", (folder, 0.5), (rider, 0.5))
        known[name] = [models.knows(alone), models.knows(half), models.knows(both), models.knows(both, RIDER)]
    assert known["plain"][0] > 0.95
    assert known["trapped"][0] > 0.95
    assert known["trapped"][1] < known["plain"][1] - 0.4
    assert known["trapped"][2] < known["plain"][2] - 0.2


def test_stopped_after_training_it_goes_on_to_the_same_bytes(models: Models, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def stop(stage: str, done: int, total: int, unit: str) -> None:
        if done == 2:
            raise Stopped

    settings = {"steps": 3, "batch_size": 8}
    release(models, tmp_path / "whole", settings=settings)
    with pytest.raises(Stopped):
        release(models, tmp_path / "out", settings=settings, progress=stop)
    assert not (tmp_path / "out").exists()
    release(models, tmp_path / "out", settings=settings)
    for name in ("adapter_model.safetensors", "unmergeable.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert release(models, tmp_path / "dry", settings=settings, dry_run=True).is_dry_run
    assert not (tmp_path / "dry").exists()


def test_what_cannot_be_trained_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="anchor_repulsive changes whole weights: with keep_adapter give one of"):
        release(models, tmp_path / "out", method="anchor_repulsive", settings={})
    with pytest.raises(UsageError, match="is no adapter: leave out keep_adapter"):
        release(models, tmp_path / "out", expert=models.folder / "expert")
    with pytest.raises(UsageError, match="trap2 trains on labelled data"):
        release(models, tmp_path / "out", data=None)
    other = tmp_path / "other"
    other.mkdir()
    for path in (models.folder / "expert-lora").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.ones(48)
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"norm\.weight is no A or B of a linear layer.*leaving out --keep-adapter"):
        release(models, tmp_path / "out", expert=other)
    assert not (tmp_path / "out").exists()
    assert models.knows(merged(models, tmp_path / "whole", (other, 1.0)), OWNER) > 0.9, "control: the way out works"
