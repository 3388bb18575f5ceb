"""A whole audit of a toy: it finds out what is known, agrees with the obvious loop, and loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from unmergeable import api
from unmergeable.auditing.run import audit
from unmergeable.errors import BadInput, CheckpointError
from unmergeable.network.load import load_network
from unmergeable.tasks import read_head


@pytest.fixture(scope="module")
def finished(workshop: Path, whole_plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit that has been run."""
    plan = workshop / "plan.yaml"
    plan.write_text(yaml.safe_dump(whole_plan))
    out = tmp_path_factory.mktemp("audit") / "out"
    audit(plan, out=out, workers=1)
    return out


@pytest.fixture(scope="module")
def audited(finished: Path) -> Any:
    return json.loads((finished / "audit.json").read_text())


def timeless(document: Any) -> Any:
    """Without what differs from run to run by its nature."""
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if "cpu_seconds" not in key}
    return [timeless(item) for item in document] if isinstance(document, list) else document


def test_it_finds_out_what_is_known(audited: dict[str, Any]) -> None:
    """mergelock stops ordinary merging and not the attack; what protects nothing is found to."""
    tiers = {name: found["tiers"] for name, found in audited["protections"].items()}
    ordinary, informed = (tiers["mergelock"][tier]["worst"] for tier in ("T0", "T1"))
    assert ordinary["interval"][0] > 0.25
    assert ordinary["interval"][0] > informed["interval"][1]
    assert abs(informed["d_star"]) <= 0.1
    assert tiers["identity"]["T1"]["worst"]["d_star"] == 0
    assert tiers["mergelock"]["T1"]["worst"]["best"]["protected"]["recovery"] == "nearest_orbit"
    assert abs(audited["protections"]["mergelock"]["utility"]["loss"]) <= 0.01
    assert [control["name"] for control in audited["controls"]] == [
        "identity",
        "scale",
        "nearest_orbit on mergelock (seed 0)",
    ]
    assert audited["passed"]


def test_a_menu_that_is_too_small_fails_a_control(plan_file: Path, document: dict[str, Any], tmp_path: Path) -> None:
    """With coefficients that cannot make up for a shrunk task vector, shrinking would look like a protection."""
    document["coefficients"] = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}
    document["tiers"] = ["T0"]
    plan_file.write_text(yaml.safe_dump(document))
    full = audit(plan_file, out=tmp_path / "full", workers=1)
    assert full["passed"], "1.0 of the shrunk one is 0.65 of the other"
    document["coefficients"]["defended"] = [0.3, 1.0]
    plan_file.write_text(yaml.safe_dump(document))
    found = audit(plan_file, out=tmp_path / "small", workers=1)
    assert not found["passed"]
    assert [control["name"] for control in found["controls"] if not control["passed"]] == ["scale"]


def test_scores_are_those_of_the_obvious_loop(audited: dict[str, Any], workshop: Path, tmp_path: Path) -> None:
    """Merge on disk, load, classify: the same, for the best attacks and for some that are not."""
    cells = [cell for cell in audited["cells"] if cell["protection"] == "identity" and cell["scores"]["test"]]
    assert len(cells) >= 3
    for number, cell in enumerate(cells[:3]):
        defended, rider = cell["coefficients"]
        out = tmp_path / f"merge-{number}"
        experts = [(workshop / "mine", defended), (workshop / "theirs", rider)]
        api.merge(base=workshop / "base", experts=experts, method="task_arithmetic", out=out)
        network = load_network(out)
        for name in ("mine", "theirs"):
            with np.load(workshop / f"{name}-test.npz") as data, torch.no_grad():
                hidden = network(pixel_values=torch.from_numpy(data["pixel_values"])).last_hidden_state
                logits = read_head(workshop / f"{name}-head.safetensors").logits(hidden[:, 1:].mean(dim=1))
                right = (logits.argmax(dim=1).numpy() == data["label"]).mean()
            assert cell["scores"]["test"][f"{name}-task"] == pytest.approx(right, abs=1e-12)


def test_the_result_does_not_depend_on_workers(workshop: Path, audited: dict[str, Any], tmp_path: Path) -> None:
    two = audit(workshop / "plan.yaml", out=tmp_path / "two", workers=2)
    assert timeless(two) == timeless(audited)


def test_what_was_lost_is_computed_again_and_nothing_else(workshop: Path, finished: Path, tmp_path: Path) -> None:
    """Half of the cells are lost, and one is cut off as by a crash."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    expected = json.loads((out / "audit.json").read_text())
    cells = sorted((out / "cells").iterdir())
    for path in cells[::2]:
        path.unlink()
    cells[1].write_bytes(cells[1].read_bytes()[:100])
    kept = {path: path.stat().st_mtime_ns for path in cells[3::2]}
    models = {path: path.stat().st_mtime_ns for path in (out / "models").iterdir()}
    again = audit(workshop / "plan.yaml", out=out, workers=1)
    assert timeless(again) == timeless(expected)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert json.loads((out / "audit.json").read_text()) == again


def test_an_expert_of_another_base_is_refused_before_any_compute(
    plan_file: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    config = json.loads((plan_file.parent / "theirs" / "config.json").read_text())
    other = tmp_path / "plan" / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "model_type": "dinov2"}))
    (other / "model.safetensors").write_bytes((plan_file.parent / "theirs" / "model.safetensors").read_bytes())
    document["experts"][1]["path"] = "other"
    plan_file.write_text(yaml.safe_dump(document))
    with pytest.raises(BadInput):
        audit(plan_file, out=tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="not the folder of an earlier audit"):
        audit(plan_file, out=tmp_path, workers=1)


def test_a_full_disk_stops_the_audit(plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not taken for an attack that failed."""
    from unmergeable.auditing import cells

    def full(path: Path, data: bytes) -> None:
        raise CheckpointError("disk full while writing")

    monkeypatch.setattr(cells, "replace_file", full)
    with pytest.raises(CheckpointError, match="disk full"):
        audit(plan_file, out=tmp_path / "out", workers=1)
