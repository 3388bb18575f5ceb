"""Plans: read, and refused in one line that says where and what."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.evaluation.attackers import ATTACKERS, LISTED
from unmergeable.evaluation.plans.audit_plan import FewShotEntry, parse_plan, read_plan
from unmergeable.evaluation.threat_models import ThreatModel


def test_a_plan(workshop: Path, document: dict[str, Any]) -> None:
    plan = parse_plan(document, workshop)
    assert (plan.victim.name, [rider.name for rider in plan.riders]) == ("mine", ["theirs"])
    assert plan.coefficients.defended == (0.3, 0.65, 1.0, 1.5)
    assert plan.threat_models == (ThreatModel.OFF_THE_SHELF, ThreatModel.WHITE_BOX)
    assert plan.connectivity == 5
    del document["connectivity"]
    assert parse_plan(document, workshop).connectivity == 11
    assert (plan.doubt, parse_plan({**document, "doubt": 0}, workshop).doubt) == (0.001, 0.0)
    asked = parse_plan({**document, "search_precision": "bfloat16"}, workshop)
    assert (plan.search_precision, asked.search_precision) == ("float32", "bfloat16")
    assert plan.task("mine-task").validation == workshop / "mine-validation.npz"


def test_a_plan_without_attacks_has_the_standard_attacker(workshop: Path, document: dict[str, Any]) -> None:
    """And one that lists its own has these and nothing else; two keys are audited unless it says otherwise."""
    listed = parse_plan(document, workshop)
    assert (listed.attacker.name, listed.attacker.combines, listed.coefficients.extends) == (LISTED, "all", False)
    assert listed.few_shot.trainings == ({},)
    assert listed.seeds == (0,)
    del document["recoveries"], document["seeds"]
    half = parse_plan(document, workshop)
    standard = ATTACKERS["standard-1"]
    assert (half.attacker, [merge.name for merge in half.merges]) == (standard, ["task_arithmetic"])
    assert [recovery.name for recovery in half.recoveries] == list(standard.recoveries)
    assert half.coefficients.extends
    assert half.seeds == (0, 1)
    del document["merges"]
    assert [merge.name for merge in parse_plan(document, workshop).merges] == list(standard.merges)
    document["attacker"] = "full-1"
    document["coefficients"]["extends"] = False
    full = parse_plan(document, workshop)
    assert (full.attacker, full.coefficients.extends) == (ATTACKERS["full-1"], False)
    document.pop("attacker")
    document |= {"merges": "standard-0", "recoveries": "standard-0"}
    assert parse_plan(document, workshop).attacker == ATTACKERS["standard-0"]


def test_trainings_of_an_attacker_are_tried_at_every_rate() -> None:
    """Each way to train with each rate; what the plan sets holds for all, and nothing is done twice."""
    entry = FewShotEntry(settings={"learning_rates": "1e-4,1e-3"}, trainings=({}, {"steps": 30}, {"low_rank": 8}))
    found = [(method.learning_rates, method.steps, method.low_rank) for method in entry.methods(16)]
    rates = ("0.0001", "0.001")
    assert found == [(rate, steps, rank) for steps, rank in ((100, 0), (30, 0), (100, 8)) for rate in rates]
    fixed = replace(entry, settings={"learning_rates": "1e-4", "steps": 30})
    assert [(method.steps, method.low_rank) for method in fixed.methods(16)] == [(30, 0), (30, 8)]


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("misspelt", lambda d: d.update(recoverys=[]), "no entry 'recoverys'; did you mean 'recoveries'"),
    ("misspelt inside", lambda d: d["tasks"][0].update(haed="x"), "tasks 1 has no entry 'haed'; did you mean 'head'"),
    ("missing", lambda d: d.pop("base"), "base is missing"),
    ("no file", lambda d: d["experts"][1].update(path="nowhere"), "nowhere does not exist"),
    ("no data", lambda d: d["tasks"][1].update(test="x.npz"), "x.npz does not exist"),
    ("same task", lambda d: d["tasks"][1].update(name="mine-task"), "'mine-task' is there twice"),
    ("same expert", lambda d: d["experts"][1].update(name="mine"), "'mine' is there twice"),
    ("no such merge", lambda d: d.update(merges=["tise"]), "no merge is called 'tise'; did you mean 'ties'"),
    ("no such recovery", lambda d: d.update(recoveries=["kabsh"]), "did you mean 'kabsch'"),
    ("no such protection", lambda d: d["protect"].update(methods=["mergelok"]), "did you mean 'mergelock'"),
    ("no such setting", lambda d: d.update(merges=[{"method": "ties", "settings": {"desnity": 1}}]), "'desnity'"),
    ("no such expert", lambda d: d["protect"].update(expert="mien"), "no expert is called 'mien'"),
    ("no such task", lambda d: d["experts"][0].update(task="mine"), "no task is called 'mine'"),
    ("no rider", lambda d: d["experts"].pop(), "nobody to merge with"),
    ("rider has the skill", lambda d: d["experts"][1].update(task="mine-task"), "it has the defended task"),
    ("no full use", lambda d: d["coefficients"].update(defended=[0.3, 0.9]), "defended must contain 1.0"),
    ("text for a number", lambda d: d["coefficients"].update(rider=["much"]), "must be a list of numbers"),
    ("tier", lambda d: d.update(tiers=["T0", "T7"]), "no threat model is called 'T7'; known: off_the_shelf"),
    ("both kinds of data", lambda d: d["tasks"][0].update(data="mine-test.npz"), "either data, which is split, or"),
    ("needs data", lambda d: d.update(merges=["fisher"]), "fisher needs"),
    ("no tier", lambda d: d.update(tiers=[]), "tiers: none is left"),
    ("nothing to learn from", lambda d: d.update(tiers=["T2"]), "retrain learn from examples; give train"),
    ("trains on nothing", lambda d: d.update(threat_models=["retrain"]), "retrain learn from examples; give train"),
    ("half a rehearsal", lambda d: d.update(retrain={"samples": [2.5]}), "whole numbers of at least 2"),
    (
        "nobody runs it",
        lambda d: d.update(threat_models=["off_the_shelf", "black_box"]),
        "none only runs the release, which is all that threat model black_box may do; add distil",
    ),
    (
        "runs it as nobody",
        lambda d: d.update(recoveries=["distil"], threat_models=["off_the_shelf"]),
        "recovery distil: it only runs the release, as threat model black_box does; add that",
    ),
    (
        "nothing to run it on",
        lambda d: d.update(recoveries=["nearest_orbit", "distil"], threat_models=["white_box", "black_box"]),
        "task theirs-task: recovery distil reads examples; give them as train",
    ),
    ("students alone undo nothing", lambda d: d.update(recoveries=["distil"]), "threat model white_box undoes what"),
    ("learns from the test", lambda d: d["tasks"][0].update(train="mine-test.npz"), "train must be other data"),
    ("learns without T3", lambda d: d.update(merges=["adamerging"]), "it needs data, which threat model unlabelled"),
    (
        "reads without T3",
        lambda d: d.update(recoveries=["layerwise_ridge"]),
        "it needs data, which threat model unlabelled",
    ),
    ("half a sample", lambda d: d.update(few_shot={"samples": [2.5]}), "whole numbers of at least 2"),
    ("no such rate", lambda d: d.update(few_shot={"settings": {"learning_rates": "much"}}), "learning_rates='much'"),
    ("not before merging", lambda d: d.update(recoveries=["few_shot"]), "few_shot works on merges, not on releases"),
    ("no sources", lambda d: d.update(recoveries=["source_subtraction"]), "needs sources"),
    ("a chain", lambda d: d.update(recoveries=["taylor_inversion, kabsh"]), "did you mean 'kabsch'"),
    (
        "calibrated on nothing",
        lambda d: d["protect"].update(methods=["taylor_mlp"]),
        "taylor_mlp reads data; give data",
    ),
    (
        "data for nothing",
        lambda d: d["protect"].update(methods=[{"method": "mergelock", "data": "mine-test.npz"}]),
        "reads no data; leave it out",
    ),
    (
        "other inputs for nothing",
        lambda d: d["protect"].update(methods=[{"method": "mergelock", "generic": "mine-test.npz"}]),
        "reads no generic; leave it out",
    ),
    (
        "no such sibling",
        lambda d: d["protect"].update(methods=[{"method": "sensitivity_shield", "siblings": ["brother"]}]),
        "brother does not exist",
    ),
    ("no attacks", lambda d: d.update(recoveries=[]), "recoveries: there are none, and an attacker of threat"),
    ("attacks refused", lambda d: d.update(recoveries=[]), "leave the entry out for the standard ones, or give"),
    ("two attackers", lambda d: d.update(attacker="quick"), "attacker stands for merges and recoveries; leave these"),
    (
        "no attacker",
        lambda d: (d.pop("merges"), d.pop("recoveries"), d.update(attacker="quik")),
        "did you mean 'quick'",
    ),
    ("extends", lambda d: d["coefficients"].update(extends="yes"), "extends: must be true or false, not 'yes'"),
    ("no such attacker", lambda d: d.update(recoveries="standrad"), "'standrad'; did you mean 'standard'"),
    ("tiers twice", lambda d: d.update(tiers=["T0"], threat_models=["T0"]), "tiers is the older name of threat_models"),
    ("doubt", lambda d: d.update(doubt=1), "doubt: must be a number from 0, which leaves no attack out, to below 1"),
    ("no doubt", lambda d: d.update(doubt=True), "doubt: must be a number"),
    ("a precision", lambda d: d.update(search_precision="bf16"), "'bf16'; did you mean 'bfloat16'"),
    ("a line without a middle", lambda d: d.update(connectivity=2), "must be at least 3, or 0 to leave it out"),
    ("an analysis", lambda d: d.update(analyses={"exmaples": 5}), "did you mean 'examples'"),
    ("an expert called base", lambda d: d["experts"][1].update(name="base"), "'base' is what every audit calls"),
    (
        "a protection called as a control",
        lambda d: d["protect"].update(methods=[{"name": "identity", "method": "mergelock"}]),
        "'identity' is what every audit calls",
    ),
    ("a date", lambda d: d["tasks"][0].update(name=date(2024, 1, 1)), "tasks 1, name: 2024-01-01 is a date to YAML"),
    ("a list", lambda d: d.update(protect=[]), "protect: a mapping is wanted"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_what_is_wrong_is_said(
    workshop: Path, document: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    parse_plan(document, workshop)
    change(document)
    with pytest.raises(UnmergeableError) as error:
        parse_plan(document, workshop)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"base: [", b"\xff\xfe", b"- 1", b"", None])
def test_what_is_no_plan(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        read_plan(path)
    assert "\n" not in str(error.value)


def test_checkpoints_on_the_hub_are_downloaded_once_the_plan_is_right(
    workshop: Path, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str) -> Path:
        asked.append(name)
        return tmp_path / name.rpartition("/")[2]

    monkeypatch.setattr("unmergeable.evaluation.plans.plan.download", download)
    document["base"] = "hub:owner/base"
    document["experts"][0]["path"] = "hub:owner/mine@v1"
    plan = parse_plan(document, workshop)
    assert asked == []
    local = plan.downloaded()
    assert (local.base, local.victim.path) == (tmp_path / "base", tmp_path / "mine@v1")
    assert {task.encoder for task in local.tasks} == {tmp_path / "base"}
    assert local.riders == plan.riders


def test_what_attackers_learn_from(workshop: Path, document: dict[str, Any]) -> None:
    """One file is divided into three parts; a chain of recoveries is one attack; adamerging is of the highest tier."""
    document["tiers"] = ["T3"]
    document["merges"] = ["task_arithmetic", "adamerging"]
    document["recoveries"] = ["taylor_inversion, nearest_orbit", {"method": "layerwise_ridge", "name": "ridge"}]
    document["few_shot"] = {"samples": [100, 16], "settings": {"learning_rates": "1e-4,1e-3", "low_rank": 4}}
    for task in document["tasks"]:
        task["train"] = f"{task['name'].removesuffix('-task')}-train.npz"
    del document["tasks"][1]["validation"], document["tasks"][1]["test"], document["tasks"][1]["train"]
    document["tasks"][1]["data"] = "theirs-train.npz"
    plan = parse_plan(document, workshop)
    assert plan.few_shot.samples == (16, 100)
    assert [(m.samples, m.learning_rates, m.low_rank) for m in plan.few_shot.methods(16)] == [
        (16, "0.0001", 4),
        (16, "0.001", 4),
    ]
    assert [merge.threat_model.code for merge in plan.merges] == ["T0", "T3"]
    assert [(entry.name, entry.threat_model.code) for entry in plan.recoveries] == [
        ("taylor_inversion, nearest_orbit", "T1"),
        ("ridge", "T3"),
    ]
    assert [step.method for step in plan.recoveries[0].steps] == ["taylor_inversion", "nearest_orbit"]
    assert [task.is_split for task in plan.tasks] == [False, True]
    assert plan.tasks[1].train == plan.tasks[1].test == workshop / "theirs-train.npz"


def test_the_documented_plan_is_one(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "audit.md").read_text()
    text = guide.split("```yaml\n")[1].split("```")[0]
    for name in re.findall(r"[\w-]+\.(?:npz|safetensors)|expert-\w+", text):
        (tmp_path / name).touch()
    (tmp_path / "base").mkdir()
    plan = parse_plan(yaml.safe_load(text), tmp_path)
    assert [model.code for model in plan.threat_models] == ["T0", "T1", "T2"]
    assert [entry.is_exact for entry in plan.protections] == [True, True, False, False]


def test_a_named_attacker_runs_the_release_where_that_is_asked_for(workshop: Path, document: dict[str, Any]) -> None:
    """Students of the base and of the free-rider's own model; a plan that lists its own recoveries has those."""
    document["tasks"][1]["train"] = "theirs-train.npz"
    document |= {"recoveries": "standard-0", "threat_models": ["white_box", "black_box"]}
    plan = parse_plan(document, workshop)
    students = [entry for entry in plan.recoveries if entry.threat_model is ThreatModel.BLACK_BOX]
    assert [entry.name for entry in students] == ["distil", "distil, from its own model"]
    assert [dict(entry.steps[0].settings) for entry in students] == [{}, {"start": "source"}]
    assert plan.strongest is ThreatModel.WHITE_BOX
    assert plan.reaches(ThreatModel.BLACK_BOX)
    assert not plan.reaches(ThreatModel.RETRAIN)
    document["recoveries"] = ["nearest_orbit", "distil, canonicalise"]
    assert [entry.threat_model.code for entry in parse_plan(document, workshop).recoveries] == ["T1", "black_box"]
    document["threat_models"] = ["white_box"]
    document["recoveries"] = "standard-0"
    assert all(entry.threat_model.merges for entry in parse_plan(document, workshop).recoveries)
