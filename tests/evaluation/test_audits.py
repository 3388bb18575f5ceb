"""A whole audit of a toy: it finds out what is known, agrees with the obvious loop, and loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evaluation.timeless import timeless
from unmergeable import ops
from unmergeable.errors import BadInput, CheckpointError
from unmergeable.evaluation.attackers import ATTACKERS
from unmergeable.evaluation.audits import Audit, audit
from unmergeable.evaluation.cells import Cell, CellStore, identity
from unmergeable.evaluation.packing import pack, unpack
from unmergeable.evaluation.recompute import recomputed
from unmergeable.evaluation.report.page import render_report
from unmergeable.evaluation.report.verdict import verdict
from unmergeable.evaluation.results import AuditResult, ProtectionResult, read_audit
from unmergeable.evaluation.run import locked
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.network.load import load_network
from unmergeable.pools.pool import Call
from unmergeable.tasks import read_head


def run(plan: Path, *, out: Path, workers: int = 1) -> Any:
    """The result of an audit as it stands in audit.json."""
    return audit(plan, out=out, workers=workers).to_json()


@pytest.fixture(scope="module")
def finished(workshop: Path, whole_plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit that has been run."""
    plan = workshop / "plan.yaml"
    plan.write_text(yaml.safe_dump(whole_plan))
    out = tmp_path_factory.mktemp("audit") / "out"
    run(plan, out=out, workers=1)
    return out


@pytest.fixture(scope="module")
def audited(finished: Path) -> Any:
    return json.loads((finished / "audit.json").read_text())


@pytest.fixture(scope="module")
def small(workshop: Path, whole_plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit of the small plan."""
    plan = workshop / "small.yaml"
    coefficients = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}
    plan.write_text(yaml.safe_dump({**whole_plan, "coefficients": coefficients, "tiers": ["T0"]}))
    out = tmp_path_factory.mktemp("small") / "out"
    run(plan, out=out)
    return out


@pytest.fixture(scope="module")
def expected(small: Path) -> Any:
    return json.loads((small / "audit.json").read_text())


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
        "scale",
        "planted",
        "planted_structure",
        "nothing",
        "exact: mergelock",
        "nearest_orbit on mergelock (seed 0)",
        "lossless_pruning, nearest_orbit on mergelock (seed 0)",
    ]
    assert audited["passed"], audited["controls"]


def test_anybody_can_compute_it_again(audited: dict[str, Any]) -> None:
    """From the credits of a compact result alone: the same D*, intervals and areas, at every bar."""
    result = AuditResult.from_json(audited).compact({"made": "here"})
    assert result.count == len(audited["cells"])
    read = AuditResult.from_json(json.loads(json.dumps(result.to_json())))
    assert read == result
    trials = 0
    for found in recomputed(read):
        trials += 1
        assert found.trial.area == (None if np.isnan(found.area) else found.area)
        assert len(found.at_bars) == len(found.trial.bars) == 3
        for bar, one in zip(found.trial.bars, found.at_bars, strict=True):
            assert (bar.kept_share, bar.d_star, *bar.interval) == (one.kept_share, one.d_star, one.low, one.high)
        assert found.d_star == found.trial.d_star
        assert found.at_bars[1].protected == found.trial.protected
    assert trials == 2 * len(read.protections)
    # Control: with one wrong answer more in the best attack it is another figure.
    cells = list(result.cells or ())
    worst = result.protections["identity"].tiers[ThreatModel.WHITE_BOX].worst
    assert worst is not None
    best = next(
        number
        for number, cell in enumerate(cells)
        if (cell.protection, cell.attack) == ("identity", worst.best["unprotected"])
    )
    packed = cells[best].credits
    assert packed is not None
    marred = unpack(packed["test"]["mine-task"])
    marred[np.flatnonzero(marred)[0]] = 0
    changed = {**packed, "test": {**packed["test"], "mine-task": pack(marred)}}
    cells[best] = replace(cells[best], credits=changed)
    others = recomputed(replace(result, cells=tuple(cells)))
    assert any(found.d_star != found.trial.d_star for found in others)
    with pytest.raises(BadInput, match="stored without credits"):
        list(recomputed(replace(result, riders=None)))


def test_a_menu_that_is_too_small_fails_a_control(plan_file: Path, document: dict[str, Any], tmp_path: Path) -> None:
    """With coefficients that cannot make up for a shrunk task vector, shrinking would look like a protection."""
    document["coefficients"] = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}
    document["tiers"] = ["T0"]
    document["connectivity"] = 0
    plan_file.write_text(yaml.safe_dump(document))
    full = run(plan_file, out=tmp_path / "full", workers=1)
    assert full["connectivity"] == []
    assert full["passed"], "1.0 of the shrunk one is 0.65 of the other"
    document["coefficients"]["defended"] = [0.3, 1.0]
    plan_file.write_text(yaml.safe_dump(document))
    found = run(plan_file, out=tmp_path / "small", workers=1)
    assert not found["passed"]
    assert [control["name"] for control in found["controls"] if not control["passed"]] == ["scale"]


def test_the_ends_of_a_line_are_the_two_models(audited: dict[str, Any]) -> None:
    for line in audited["connectivity"]:
        assert (line["share"][0], line["share"][-1], len(line["share"])) == (0.0, 1.0, 5)
        for task, scores in line["scores"].items():
            assert scores[0] == audited["alone"]["theirs"][task]
            if line["recovery"] is None:
                assert scores[-1] == audited["alone"][f"{line['protection']} (seed 0)"][task]
    (lock,) = (
        line for line in audited["connectivity"] if (line["protection"], line["recovery"]) == ("mergelock", None)
    )
    assert lock["scores"]["mine-task"][2] != lock["scores"]["mine-task"][-1], "the line is no point"


def test_scores_are_those_of_the_obvious_loop(audited: dict[str, Any], workshop: Path, tmp_path: Path) -> None:
    """Merge on disk, load, classify: the same, for the best attacks and for some that are not."""
    cells = [cell for cell in audited["cells"] if cell["protection"] == "identity" and cell["scores"]["test"]]
    assert len(cells) >= 3
    for number, cell in enumerate(cells[:3]):
        defended, rider = cell["coefficients"]
        out = tmp_path / f"merge-{number}"
        experts = [(workshop / "mine", defended), (workshop / "theirs", rider)]
        ops.merge(base=workshop / "base", experts=experts, method="task_arithmetic", out=out)
        network = load_network(out)
        for name in ("mine", "theirs"):
            with np.load(workshop / f"{name}-test.npz") as data, torch.no_grad():
                hidden = network(pixel_values=torch.from_numpy(data["pixel_values"])).last_hidden_state
                logits = read_head(workshop / f"{name}-head.safetensors").logits(hidden[:, 1:].mean(dim=1))
                right = (logits.argmax(dim=1).numpy() == data["label"]).mean()
            assert cell["scores"]["test"][f"{name}-task"] == pytest.approx(right, abs=1e-12)


class LastFirst:
    """A pool that does the last call first, as several workers may."""

    def __init__(self, workers: int | None) -> None:
        pass

    def __enter__(self) -> LastFirst:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        for number, (function, arguments) in reversed(list(enumerate(calls))):
            yield number, function(*arguments)


def test_the_result_does_not_depend_on_the_order_of_work(
    small_plan: Path, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmergeable.evaluation.audits.WorkerPool", LastFirst)
    assert timeless(run(small_plan, out=tmp_path / "other")) == timeless(expected)


@pytest.mark.slow
def test_the_result_does_not_depend_on_workers(workshop: Path, audited: dict[str, Any], tmp_path: Path) -> None:
    two = run(workshop / "plan.yaml", out=tmp_path / "two", workers=2)
    assert timeless(two) == timeless(audited)


def examples_met(folder: Path) -> int:
    cells = [json.loads(path.read_text()) for path in (folder / "cells").iterdir()]
    return sum(len(values) for cell in cells for values in cell["credits"].values())


def test_a_race_finds_what_every_example_would(
    plan_file: Path, document: dict[str, Any], finished: Path, audited: Any, tmp_path: Path
) -> None:
    """The same attacks are chosen, each D* lies in the other's interval, and fewer examples are met."""
    document["doubt"] = 0
    plan_file.write_text(yaml.safe_dump(document))
    found = run(plan_file, out=tmp_path / "out", workers=1)
    for name, protection in found["protections"].items():
        for tier, verdicts in protection["tiers"].items():
            (raced,) = audited["protections"][name]["tiers"][tier]["trials"]
            (whole,) = verdicts["trials"]
            for key in ("d_star", "unprotected", "protected", "without_victim", "attacks_tried"):
                assert raced[key] == whole[key], (name, tier, key)
            for who, attack in timeless(whole["best"]).items():
                assert timeless(raced["best"])[who] == attack, (name, tier, who)
            assert raced["interval"] == pytest.approx(whole["interval"], abs=0.02), "what a draw here and there changes"
    left = [cell for cell in audited["cells"] if "met" in cell]
    assert left
    assert all(cell["scores"]["test"] is None for cell in left)
    assert examples_met(finished) < examples_met(tmp_path / "out")
    assert not [cell for cell in found["cells"] if "met" in cell], "control: without a race all meet all"


def cells_of(folder: Path, part: str, precision: str = "float32") -> dict[str, Any]:
    """Credits of a part that were computed so, by what else they depend on."""
    cells = [json.loads(path.read_text()) for path in (folder / "cells").iterdir()]
    chosen = [cell for cell in cells if cell["recipe"]["part"] == part]
    return {
        json.dumps(cell["recipe"], sort_keys=True): cell["credits"]
        for cell in chosen
        if cell["recipe"].pop("precision", "float32") == precision
    }


def test_attackers_may_choose_in_bfloat16_and_are_judged_in_float32(
    plan_file: Path, document: dict[str, Any], small: Path, expected: Any, tmp_path: Path
) -> None:
    """What decides is bit for bit what it was; how far the choice is from float32 is measured and said."""
    document |= {"search_precision": "bfloat16", "tiers": ["T0"], "doubt": 0}
    document["coefficients"] = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}
    plan_file.write_text(yaml.safe_dump(document))
    found = run(plan_file, out=tmp_path / "out")
    for part in ("test", "validation"):  # what may be chosen is scored in float32 on both
        exact, judged = cells_of(small, part), cells_of(tmp_path / "out", part)
        shared = exact.keys() & judged.keys()
        assert len(shared) > 5
        for recipe in shared:  # in the race of the other an attack may have left early
            for task, credited in exact[recipe].items():
                assert judged[recipe][task][: len(credited)] == credited
    assert not cells_of(tmp_path / "out", "test", "bfloat16")
    assert len(cells_of(tmp_path / "out", "validation", "bfloat16")) > 10
    for name, protection in found["protections"].items():
        ours, theirs = (kind["tiers"]["T0"]["worst"] for kind in (protection, expected["protections"][name]))
        for key in ("d_star", "unprotected", "protected", "without_victim"):
            assert ours[key] == theirs[key], (name, key)
    gap = found["search"]
    assert gap["precision"] == "bfloat16"
    assert 0 <= gap["changed"] <= 0.05
    assert gap["largest_difference"] <= gap["changed"] * 4 + 1e-12, "base and free-rider, two tasks of one length"
    assert "in bfloat16" in render_report(AuditResult.from_json(found))
    # Control: where attackers choose in float32 nothing is said.
    assert expected.get("search") is None
    assert "bfloat16" not in render_report(AuditResult.from_json(expected))


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
    again = run(workshop / "plan.yaml", out=out, workers=1)
    assert timeless(again) == timeless(expected)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert json.loads((out / "audit.json").read_text()) == again


def merged_scores(found: dict[str, Any], protection: str, recovery: str | None) -> list[float]:
    """Validation scores on both tasks, one coefficient after another."""
    cells = [cell for cell in found["cells"] if (cell["protection"], cell["recovery"]) == (protection, recovery)]
    cells.sort(key=lambda cell: cell["coefficients"])
    assert len(cells) == len(found["plan"]["coefficients"]["defended"])
    return [score for cell in cells for _, score in sorted(cell["scores"]["validation"].items())]


def test_another_structure_is_no_attack_until_it_is_undone(
    plan_file: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    """Polynomials do not merge: that is no attack, not one that scores nothing. A chain of recoveries undoes them."""
    data = {"data": "mine-train.npz"}
    document["protect"]["methods"] = [
        {"name": "polynomials", "method": "taylor_mlp", **data},
        {"name": "and heads", "method": "mergebarrier", "settings": {"top_k": 4}, **data},
    ]
    document["recoveries"] = ["revert_to_base", "taylor_inversion, nearest_orbit"]
    few = {"line": [0, 1], "coefficients": [0, 1], "noise": [0], "radii": [0.001]}
    document["analyses"] = {**few, "examples": 20, "draws": 1, "steps": 1, "points": 2}
    document["coefficients"] = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}
    document["connectivity"] = 3
    plan_file.write_text(yaml.safe_dump(document))
    found = run(plan_file, out=tmp_path / "out", workers=1)
    assert {tuple(line["share"]) for line in found["connectivity"]} == {(0.0, 0.5, 1.0)}
    assert ("polynomials", None) not in {(line["protection"], line["recovery"]) for line in found["connectivity"]}
    for name in ("polynomials", "and heads"):
        protection = found["protections"][name]
        ordinary, informed = (protection["tiers"][tier]["worst"] for tier in ("T0", "T1"))
        assert abs(protection["utility"]["loss"]) <= 0.02
        assert (ordinary["attacks_tried"], ordinary["d_star"]) == (0, 1.0)
        assert not ordinary["best"]["protected"]["uses_victim"]
        assert informed["d_star"] <= 0.1
        # The chain gives back what merges as the expert does, but for the few examples that change sides because
        # nearest_orbit ends nearer to the base than the expert itself lies. Reverted feed-forwards do not: the control.
        unprotected = merged_scores(found, "identity", None)
        assert merged_scores(found, name, "taylor_inversion, nearest_orbit") == pytest.approx(unprotected, abs=0.02)
        assert merged_scores(found, name, "revert_to_base") != pytest.approx(unprotected, abs=0.05)
        assert str(tmp_path) not in json.dumps([found["refused"], found["models"]])
        refused = [item for item in found["refused"] if item["protection"] == name and item["recovery"] is None]
        assert [item["merge"] for item in refused] == ["task_arithmetic"]
        assert "no merge with it is possible" in verdict(name, ProtectionResult.from_json(protection))
    looked_at = {(model["protection"], model["form"]): model["refused"] for model in found["analyses"]["models"]}
    assert not looked_at["identity", "raw"]
    assert "belong to another network" in looked_at["polynomials", "raw"]["noise"]
    # Control: what can be merged is.
    unprotected = found["protections"]["identity"]
    assert unprotected["tiers"]["T0"]["worst"]["attacks_tried"] == 2
    assert "no merge" not in verdict("identity", ProtectionResult.from_json(unprotected))


def test_examples_help_every_attacker_alike(plan_file: Path, document: dict[str, Any], tmp_path: Path) -> None:
    """Tier T2 has what T0 has and trains besides, with and without the victim; T3 has more merges and recoveries."""
    document["recoveries"] = [{"method": "layerwise_ridge", "settings": {"examples": 64}}]
    document["merges"] = ["task_arithmetic", {"method": "adamerging", "settings": {"steps": 2, "examples": 32}}]
    document["coefficients"] = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}
    document["tiers"] = ["T0", "T2", "T3"]
    document["connectivity"] = 0
    document["few_shot"] = {"samples": [20], "starts": 1, "settings": {"learning_rates": "1e-3,3e-3", "steps": 12}}
    for task in document["tasks"]:
        task["train"] = f"{task['name'].removesuffix('-task')}-train.npz"
    plan_file.write_text(yaml.safe_dump(document))
    found = run(plan_file, out=tmp_path / "out", workers=1)
    tiers = found["protections"]["mergelock"]["tiers"]
    (ordinary,), (trained,), (informed,) = (tiers[tier]["trials"] for tier in ("T0", "T2", "T3"))
    assert [trial["samples"] for trial in (ordinary, trained, informed)] == [None, 20, 20]
    for who in ("unprotected", "without_victim"):
        assert trained[who] >= ordinary[who] + 0.05, who
    assert trained["best"]["without_victim"]["samples"] == 20
    assert trained["attacks_tried"] == ordinary["attacks_tried"] + 2, "as many as there are rates"
    by_tier = {tier: [c for c in found["cells"] if c["tier"] == tier] for tier in ("T0", "T1", "T2", "T3")}
    assert not by_tier["T1"]
    assert {cell["samples"] for cell in by_tier["T2"]} == {20}
    assert {(c["recovery"], c["merge"]) for c in by_tier["T3"]} >= {
        (None, "adamerging"),
        ("layerwise_ridge", "task_arithmetic"),
    }
    # This attacker, who has examples and no idea of bases, is too weak for an exact release, and its audit says so.
    weak = {control["name"] for control in found["controls"] if not control["passed"]}
    assert weak == {"planted", "planted_structure", "exact: mergelock"}, found["controls"]
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert timeless(run(plan_file, out=tmp_path / "out", workers=1)) == timeless(found)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == cells
    # Control: without training, the examples are worth nothing.
    document["few_shot"]["settings"] |= {"learning_rates": "1e-12", "steps": 1}
    document["tiers"], document["recoveries"] = ["T0", "T2"], ["neuron_matching"]
    document["merges"] = ["task_arithmetic"]
    plan_file.write_text(yaml.safe_dump(document))
    (still,) = run(plan_file, out=tmp_path / "out", workers=1)["protections"]["mergelock"]["tiers"]["T2"]["trials"]
    for who in ("unprotected", "protected", "without_victim"):
        assert still[who] == ordinary[who]


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
        run(plan_file, out=tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def built(document: dict[str, Any], folder: Path, **changes: Any) -> Audit:
    """The same audit from Python, with paths of both kinds."""
    tasks = [
        {**task, **{part: folder / task[part] for part in ("validation", "test", "head")}} for task in document["tasks"]
    ]
    entries = {"coefficients": document["coefficients"], "seeds": [0]}
    given = {"base": folder / "base", "victim": str(folder / "mine"), "attacker": folder / "theirs", "tasks": tasks}
    return Audit(**{**given, "protections": document["protect"]["methods"], "entries": entries, **changes})


def test_an_audit_from_python_is_that_of_the_plan(
    small_plan: Path, document: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    """The experts are called by their roles; all else is the same, and the result answers by name."""
    listed = {"merges": document["merges"], "recoveries": []}
    entries = {"coefficients": document["coefficients"], "seeds": [0], **listed}
    mine = built(document, small_plan.parent, threat_models=["off_the_shelf"], entries=entries)
    result = mine.run(tmp_path / "python", workers=1)
    assert result.passed
    figures, others = (timeless(found)["protections"] for found in (result, expected))
    for name, protection in figures.items():
        assert protection["utility"] == others[name]["utility"]
        for key in ("d_star", "interval", "protected", "unprotected", "without_victim"):
            assert protection["tiers"]["T0"]["worst"][key] == others[name]["tiers"]["T0"]["worst"][key], (name, key)
    assert result == AuditResult.from_json(json.loads((tmp_path / "python" / "audit.json").read_text()))
    assert result == read_audit(tmp_path / "python")
    worst = expected["protections"]["mergelock"]["tiers"]["T0"]["worst"]
    assert result.d_star == {("mergelock", "off_the_shelf"): worst["d_star"]}
    assert list(result.interval["mergelock", "off_the_shelf"]) == worst["interval"]
    assert result.table.columns == ("protection", "points lost alone", "off_the_shelf")
    assert str(result.table).splitlines()[1].startswith(f"mergelock   0.0                {worst['d_star']:.2f}, 95 %")


def test_an_audit_from_python_has_the_standard_attacker(workshop: Path, document: dict[str, Any]) -> None:
    plan = built(document, workshop).plan()
    assert plan.attacker == ATTACKERS["standard-1"]
    assert [merge.name for merge in plan.merges] == list(ATTACKERS["standard-1"].merges)
    assert [entry.name for entry in plan.recoveries] == list(ATTACKERS["standard-1"].recoveries)
    older = built(document, workshop, version="standard-0").plan()
    assert [entry.name for entry in older.recoveries] == list(ATTACKERS["standard-0"].recoveries)
    assert plan.threat_models == (ThreatModel.OFF_THE_SHELF, ThreatModel.WHITE_BOX)
    assert (plan.victim.path, plan.riders[0].path) == (workshop / "mine", workshop / "theirs")
    with pytest.raises(BadInput, match="there are none"):
        built(document, workshop, entries={"recoveries": []}).plan()
    with pytest.raises(BadInput, match="2 tasks for 3 experts"):
        built(document, workshop, attacker=[workshop / "theirs", workshop / "mine"]).plan()


def test_a_folder_of_something_else_is_left_alone(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="not the folder of an earlier audit"):
        run(plan_file, out=tmp_path, workers=1)


def test_one_audit_at_a_time(plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    with locked(out), pytest.raises(BadInput, match="an audit that is running") as error:
        run(plan_file, out=out, workers=1)
    assert "\n" not in str(error.value)
    with locked(out):  # control: it was let go
        pass


def test_ctrl_c_loses_nothing(
    small_plan: Path, small: Path, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after every seventh cell, the same call comes to the result of one that was not."""
    put, written = CellStore.put, []

    def interrupted(store: CellStore, cell: Cell) -> None:
        put(store, cell)
        written.append(cell)
        if len(written) % 7 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(CellStore, "put", interrupted)
    interruptions = 0
    while True:
        try:
            found = run(small_plan, out=tmp_path / "out", workers=1)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert not (tmp_path / "out" / "audit.json").exists()
    assert interruptions >= 3
    assert timeless(found) == timeless(expected)
    met = [(identity(cell.recipe), cell.met) for cell in written]
    assert len(met) == len(set(met)), "nothing was computed twice"
    assert {name for name, _ in met} == {path.stem for path in (small / "cells").iterdir()}


def test_a_full_disk_stops_the_audit(plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not taken for an attack that failed."""
    from unmergeable.evaluation import cells

    def full(path: Path, data: bytes) -> None:
        raise CheckpointError("disk full while writing")

    monkeypatch.setattr(cells, "replace_file", full)
    with pytest.raises(CheckpointError, match="disk full"):
        run(plan_file, out=tmp_path / "out", workers=1)
