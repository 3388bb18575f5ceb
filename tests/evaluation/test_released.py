"""Audits of somebody else's releases: without the expert, without a plan, from Python and from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.timeless import timeless
from unmergeable import ops
from unmergeable.cli.app import main
from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation import Audit, audit, audit_of_releases, model_card, render_report, summary
from unmergeable.evaluation.plans.absolute import absolute_paths
from unmergeable.evaluation.plans.audit_plan import parse_plan, read_plan
from unmergeable.evaluation.results import AuditResult
from unmergeable.evaluation.threat_models import ThreatModel

QUICK: dict[str, Any] = {
    "coefficients": {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0},
    "connectivity": 3,
    "merges": ["task_arithmetic"],
    "recoveries": ["nearest_orbit"],
}


@pytest.fixture
def folder(plan_file: Path) -> Path:
    """The workshop with a release of ``mine`` in another basis."""
    folder = plan_file.parent
    made = folder / "release"
    ops.protect(folder / "mine", base=folder / "base", out=made, key=folder / "key", method="mergelock", seed=0)
    return folder


def without_expert(document: dict[str, Any]) -> dict[str, Any]:
    methods = [{"name": "release", "checkpoint": "release"}]
    experts = [expert for expert in document["experts"] if expert["name"] != "mine"]
    return {**document, **QUICK, "experts": experts, "protect": {"task": "mine-task", "methods": methods}}


def run(folder: Path, document: dict[str, Any], out: Path) -> AuditResult:
    (folder / "plan.yaml").write_text(yaml.safe_dump(document))
    return audit(folder / "plan.yaml", out=out, workers=1)


def test_without_the_expert_scores_are_known_and_d_star_is_not(
    folder: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    whole = {
        **document,
        **QUICK,
        "protect": {"expert": "mine", "methods": [{"name": "release", "checkpoint": "release"}]},
    }
    known, unknown = run(folder, whole, tmp_path / "whole"), run(folder, without_expert(document), tmp_path / "out")
    assert unknown.d_star == {("release", "off_the_shelf"): None, ("release", "white_box"): None}
    assert (known.has_expert, unknown.has_expert) == (True, False)
    for model in (ThreatModel.OFF_THE_SHELF, ThreatModel.WHITE_BOX):
        with_expert, worst = (found.protections["release"].tiers[model].worst for found in (known, unknown))
        assert with_expert is not None
        assert worst is not None
        # Everything but what the expert would say is the same.
        assert (worst.protected, worst.without_victim) == (with_expert.protected, with_expert.without_victim)
        best, other = (replace(trial.best["protected"], cpu_seconds=0.0) for trial in (worst, with_expert))
        assert best == other
        assert (worst.d_star, worst.unprotected) == (None, None)
        assert with_expert.d_star is not None
    assert unknown.protections["release"].utility.protected == known.protections["release"].utility.protected
    assert unknown.controls == ()
    assert unknown.passed
    first, said = summary(unknown)
    assert first.startswith("D* is unknown")
    assert "--expert" in first
    informed = unknown.protections["release"].tiers[ThreatModel.WHITE_BOX].worst
    assert informed is not None
    assert f"gets {informed.protected:.0%}, against {informed.without_victim:.0%} without it" in said
    assert "stop" not in said
    page = render_report(unknown)
    assert "D* is unknown" in page
    assert "unmergeable recover release --base base --method nearest_orbit" in page
    assert "D* is unknown" in model_card(unknown)
    assert "D* is unknown" not in render_report(known)  # control
    assert unknown == AuditResult.from_json(json.loads((tmp_path / "out" / "audit.json").read_text()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protect": {"task": "mine-task", "methods": ["mergelock"]}}, "mergelock needs an expert to be applied to"),
        ({"protect": {"task": "mine", "methods": [{"name": "a", "checkpoint": "mine"}]}}, "no task is called 'mine'"),
        ({"protect": {"task": "mine-task", "expert": "theirs", "methods": ["mergelock"]}}, "give either expert, which"),
        ({"analyses": {}}, "they compare with the unprotected expert"),
        (
            {"protect": {"task": "mine-task", "methods": [{"checkpoint": "mine", "method": "mergelock"}]}},
            "give either method, which is applied here, or checkpoint",
        ),
        ({"protect": {"task": "mine-task", "methods": [{"checkpoint": "mine"}]}}, "name is missing"),
        (
            {
                "protect": {
                    "task": "mine-task",
                    "methods": [{"name": "a", "checkpoint": "mine", "trust_remote_code": "no"}],
                }
            },
            "trust_remote_code: must be true or false",
        ),
        ({"protect": {"task": "mine-task", "methods": [{"name": "a", "checkpoint": "gone"}]}}, "gone does not exist"),
    ],
)
def test_plans_without_the_expert(folder: Path, document: dict[str, Any], change: dict[str, Any], message: str) -> None:
    plan = without_expert(document)
    assert parse_plan(plan, folder).defended_task == "mine-task"
    with pytest.raises(BadInput) as error:
        parse_plan({**plan, **change}, folder)
    assert message in str(error.value)


def options(folder: Path, *more: str) -> list[str]:
    given = {"base": "base", "release": "release", "rider": "theirs", "task-data": "mine-test.npz"}
    given |= {"rider-data": "theirs-test.npz", "head": "mine-head.safetensors", "rider-head": "theirs-head.safetensors"}
    return [text for name, value in given.items() for text in (f"--{name}", str(folder / value))] + list(more)


def test_the_command_line_without_a_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what it would do and writes nothing; then it does it, and leaves the plan it followed."""
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    assert main(["audit", *options(Path()), "--dry-run", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "off_the_shelf, white_box" in said
    assert "D* is unknown" in said
    assert not out.exists()
    monkeypatch.setattr("unmergeable.evaluation.released.Audit", quick)
    assert main(["audit", *options(Path()), "--out", str(out), "--workers", "1"]) == 0
    assert "D* is unknown" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    again = read_plan(out / "plan.yaml")
    assert again.base == folder / "base"
    assert [release.checkpoint for release in again.releases] == [folder / "release"]
    stored = json.loads((out / "audit.json").read_text())
    cells = {path.name for path in (out / "cells").iterdir()}
    repeated = audit(out / "plan.yaml", out=out, workers=1).to_json()
    drop = ("plan",)
    assert {k: v for k, v in timeless(repeated).items() if k not in drop} == {
        k: v for k, v in timeless(stored).items() if k not in drop
    }
    assert {path.name for path in (out / "cells").iterdir()} == cells, "the same plan: nothing is computed again"


def quick(**fields: Any) -> Audit:
    """The audit with a few attacks only."""
    return Audit(**fields, entries={**QUICK, "threat_models": ["off_the_shelf"]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "base"], "give a plan, or what stands for one: --release, --rider, --task-data, --rider-data"),
        (["plan.yaml", "--base", "base"], "give either a plan, or --base"),
        (["plan.yaml"], "--out is missing"),
        ([*options(Path("x")), "--rider", "y", "--out", "z"], "1 --rider-data for 2 riders"),
        ([*options(Path("x")), "--rider", "y", "--rider-data", "w", "--out", "z"], "1 --rider-head for 2 riders"),
        ([*options(Path("x")), "--release", "y", "--recovered", "w", "--out", "z"], "are of one release"),
    ],
)
def test_what_is_asked_for_badly(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *words]) == UsageError.exit_code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_expert_may_be_given_and_releases_of_one_name_are_numbered(folder: Path) -> None:
    paths = {"base": folder / "base", "task_data": folder / "mine-test.npz", "rider_data": [folder / "theirs-test.npz"]}
    asked = audit_of_releases(
        **paths,  # type: ignore[arg-type]
        releases=[folder / "release", folder / "release"],
        riders=[folder / "theirs"],
        expert=folder / "mine",
        threat_models=["T0"],
    )
    plan = asked.plan()
    assert plan.victim.path == folder / "mine"
    assert [release.name for release in plan.releases] == ["release 1", "release 2"]
    assert plan.threat_models == (ThreatModel.OFF_THE_SHELF,)
    assert [task.is_split for task in plan.tasks] == [True, True]


def test_paths_are_made_absolute_everywhere() -> None:
    document = {
        "base": "hub:owner/base",
        "experts": [{"name": "data", "path": "mine", "task": "test"}],
        "protect": {
            "expert": "data",
            "methods": [{"method": "m", "siblings": ["a", "hub:b/c"], "generic": "g", "settings": {"data": "x"}}],
        },
        "tasks": [
            {"name": "test", "test": "t.npz", "examples": {"test": 5}},
            {"name": "p", "kind": "text_to_image", "settings": {"pipeline": "pipe", "prompt": "data"}},
        ],
    }
    assert absolute_paths(document, Path("/here")) == {
        "base": "hub:owner/base",
        "experts": [{"name": "data", "path": "/here/mine", "task": "test"}],
        "protect": {
            "expert": "data",
            "methods": [
                {"method": "m", "siblings": ["/here/a", "hub:b/c"], "generic": "/here/g", "settings": {"data": "x"}}
            ],
        },
        "tasks": [
            {"name": "test", "test": "/here/t.npz", "examples": {"test": 5}},
            {"name": "p", "kind": "text_to_image", "settings": {"pipeline": "/here/pipe", "prompt": "data"}},
        ],
    }
