"""What a stranger's manifest says of itself is read with care."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from unmergeable import ops
from unmergeable.checkpoint.manifest import Manifest
from unmergeable.errors import CheckpointError
from unmergeable.ops.recorded import condition_of, earlier_steps, methods_of
from zoo import TOYS, write_toy


@pytest.mark.parametrize("value", ["4", True, None, 0.5, -1, [4], float("inf"), {"a": 1}])
def test_a_condition_is_a_number_of_at_least_one(value: Any) -> None:
    with pytest.raises(CheckpointError, match="condition_bound"):
        condition_of(Manifest((), details={"condition_bound": value}))
    assert condition_of(Manifest((), details={"condition_bound": 4})) == 4.0
    assert condition_of(None) == condition_of(Manifest(())) == 1.0


@pytest.mark.parametrize("value", ["steps", {"a": 1}, [1], [None], 3])
def test_earlier_steps_are_objects(value: Any) -> None:
    with pytest.raises(CheckpointError, match="earlier_steps"):
        earlier_steps(Manifest((), details={"earlier_steps": value}))
    assert earlier_steps(Manifest((), details={"earlier_steps": [{"recipe": 1}]})) == ({"recipe": 1},)


@pytest.mark.parametrize("recipe", ["gauge", 3, {"steps": 3}, {"steps": [3, {"method": 4}, {}]}, {"steps": None}, None])
def test_a_recipe_of_another_shape_names_no_method(recipe: Any) -> None:
    assert methods_of({"recipe": recipe}) == ()
    assert methods_of({"recipe": {"method": "mergeguard"}}) == ("mergeguard",)
    assert methods_of({"recipe": {"steps": [{"method": "params"}, {"method": "gauge"}]}}) == ("params", "gauge")
    (name,) = methods_of({"recipe": {"method": "a\x1b[31m" + "b" * 10_000}})
    assert "\x1b" not in name
    assert len(name) < 200


def test_a_malformed_manifest_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["gpt2"], tmp_path / name, seed=seed)
    ops.protect(tmp_path / "expert", base=tmp_path / "base", out=tmp_path / "release", method="mergelock")
    shutil.copytree(tmp_path / "release", tmp_path / "spoiled")
    file = tmp_path / "spoiled" / "unmergeable.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "earlier_steps": [{"recipe": 1}, "step"]}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="earlier_steps"):
        ops.restore(tmp_path / "spoiled", key=tmp_path / "release.key", out=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    assert "protected" in ops.inspect(tmp_path / "spoiled").verdict
