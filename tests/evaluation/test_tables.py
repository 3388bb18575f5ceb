"""A whole table of a toy: its scores are those of the obvious loop, its averages those of its scores."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evaluation.timeless import timeless
from unmergeable import ops
from unmergeable.errors import BadInput
from unmergeable.evaluation.plans.table_plan import parse_table_plan
from unmergeable.evaluation.tables import table
from unmergeable.network.load import load_network
from unmergeable.tasks import read_head


@pytest.fixture(scope="module")
def plan_file(trio: Path, table_document: dict[str, Any]) -> Path:
    path = trio / "table.yaml"
    path.write_text(yaml.safe_dump(table_document))
    return path


@pytest.fixture(scope="module")
def finished(plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a table that has been made."""
    out = tmp_path_factory.mktemp("table") / "out"
    table(plan_file, out=out, workers=1)
    return out


@pytest.fixture(scope="module")
def found(finished: Path) -> Any:
    return json.loads((finished / "table.json").read_text())


def cell_of(found: Any, victim: str, variant: str, partners: list[str], merge: str) -> Any:
    (cell,) = (
        cell
        for cell in found["cells"]
        if (cell["victim"], cell["variant"], cell["partners"], cell["merge"]) == (victim, variant, partners, merge)
    )
    return cell


def right(folder: Path, trio: Path, task: str, part: str = "test") -> float:
    """The share of examples that a checkpoint gets right, without any of the code of tables."""
    with np.load(trio / f"{task}-{part}.npz") as data, torch.no_grad():
        hidden = load_network(folder)(pixel_values=torch.from_numpy(data["pixel_values"])).last_hidden_state
        logits = read_head(trio / f"{task}-head.safetensors").logits(hidden[:, 1:].mean(dim=1))
        return float((logits.argmax(dim=1).numpy() == data["label"]).mean())


@pytest.mark.parametrize("variant", ["unprotected", "mergelock"])
@pytest.mark.parametrize("partners", [["theirs"], ["theirs", "both"]], ids=["pair", "triple"])
@pytest.mark.parametrize("merge", ["task_arithmetic", "ties"])
def test_scores_are_those_of_the_obvious_loop(
    found: Any, trio: Path, tmp_path: Path, variant: str, partners: list[str], merge: str
) -> None:
    """Protect, merge on disk, load, classify: the same, on the task of the victim and of its partners."""
    victim = trio / "mine"
    if variant == "mergelock":
        victim = tmp_path / "released"
        key = tmp_path / "key"
        ops.protect(trio / "mine", base=trio / "base", out=victim, key=key, method="mergelock", seed=0)
    coefficient = 0.5 if merge == "task_arithmetic" else None
    experts = [(victim, coefficient), *((trio / name, coefficient) for name in partners)]
    ops.merge(base=trio / "base", experts=experts, method=merge, out=tmp_path / "merge")
    cell = cell_of(found, "mine", variant, partners, "task_arithmetic, 0.5" if coefficient else merge)
    assert set(cell["scores"]) == {"mine-task", "theirs-task"}
    for task in ("mine", "theirs"):
        assert cell["scores"][f"{task}-task"] == pytest.approx(right(tmp_path / "merge", trio, task), abs=1e-6)


def test_models_alone(found: Any, trio: Path) -> None:
    alone = found["alone"]
    assert alone["base"]["mine-task"] == pytest.approx(right(trio / "base", trio, "mine"), abs=1e-6)
    assert alone["experts"]["theirs"] == pytest.approx(right(trio / "theirs", trio, "theirs"), abs=1e-6)
    assert alone["protected"]["mergelock"]["mine"] == pytest.approx(alone["experts"]["mine"], abs=0.01)
    assert set(alone["protected"]["polynomials"]) == {"mine", "theirs"}


def test_what_a_protection_costs_elsewhere(found: Any, trio: Path) -> None:
    """On a task of no expert victims are scored, as they are and as they are released."""
    elsewhere = found["alone"]["elsewhere"]["elsewhere"]
    for victim in ("mine", "theirs"):
        assert elsewhere["experts"][victim] == pytest.approx(right(trio / victim, trio, "mine", "train"), abs=1e-6)
        assert elsewhere["protected"]["mergelock"][victim] == pytest.approx(elsewhere["experts"][victim], abs=0.02)
        assert (
            found["figures"][f"{victim} / mergelock / alone / elsewhere"]
            == (elsewhere["protected"]["mergelock"][victim])
        )
    assert elsewhere["experts"]["theirs"] < elsewhere["experts"]["mine"] - 0.1  # control: models are told apart
    assert "both" not in elsewhere["experts"]


def test_it_finds_out_what_is_known(found: Any) -> None:
    """mergelock spoils merges, and nearest_orbit brings them back."""
    figures = found["figures"]
    plain, hidden, back = (
        figures[f"{variant} / task_arithmetic, 0.5 / pairs"]
        for variant in ("unprotected", "mergelock", "mergelock, after nearest_orbit")
    )
    assert hidden < plain - 0.1
    assert back == pytest.approx(plain, abs=0.02)


def test_averages_are_those_of_the_cells(found: Any) -> None:
    tasks = {"mine": "mine-task", "theirs": "theirs-task", "both": "theirs-task"}
    (average,) = (a for a in found["averages"] if a["label"] == "mergelock / ties / pairs")
    cells = [c for c in found["cells"] if (c["variant"], c["merge"], len(c["partners"])) == ("mergelock", "ties", 1)]
    assert len(cells) == 4
    rows = {
        victim: fmean(cell["scores"][tasks[victim]] for cell in cells if cell["victim"] == victim)
        for victim in ("mine", "theirs")
    }
    assert {name: row["mean"] for name, row in average["rows"].items()} == pytest.approx(rows, abs=1e-6)
    assert average["mean"] == pytest.approx(fmean(rows.values()), abs=1e-6)
    plain = found["figures"]["unprotected / ties / pairs"]
    assert average["difference"]["mean"] == pytest.approx(average["mean"] - plain, abs=2e-6)
    assert average["partners_mean"] == pytest.approx(
        fmean(cell["scores"][tasks[cell["partners"][0]]] for cell in cells), abs=1e-6
    )
    base = fmean(found["alone"]["base"][tasks[victim]] for victim in rows)
    expert = fmean(found["alone"]["experts"][victim] for victim in rows)
    assert average["drop_ratio"] == pytest.approx((expert - average["mean"]) / (expert - base), abs=1e-4)
    # The rows are of two tasks, whose examples are independent.
    errors = [row["standard_error"] for row in average["rows"].values()]
    assert average["standard_error"] == pytest.approx(np.hypot(*errors) / 2, abs=1e-6)
    assert 0 < average["standard_error"] < 0.05


def test_a_refusal_is_no_score(found: Any, trio: Path) -> None:
    """Feed-forwards of polynomials do not merge: a reason stands there, which names no place on this machine."""
    refused = [cell for cell in found["cells"] if cell["variant"] == "polynomials"]
    assert len(refused) == 12
    for cell in refused:
        assert "scores" not in cell
        assert "in base but not in expert 1" in cell["refused"]
    (average,) = (a for a in found["averages"] if a["label"] == "polynomials / ties / pairs")
    assert (average["mean"], average["rows"], average["refused"]) == (None, {}, 4)
    assert found["figures"]["polynomials / ties / pairs"] is None
    lost = [cell["refused"] for cell in found["cells"] if cell["variant"] == "polynomials, after nearest_orbit"]
    assert len(lost) == 12
    assert all(str(trio) not in text for text in lost)
    # Control: what can be merged is.
    assert all("scores" in cell for cell in found["cells"] if not cell["variant"].startswith("polynomials"))


def test_every_figure_has_its_label(found: Any, trio: Path, table_document: dict[str, Any]) -> None:
    assert set(found["figures"]) == set(parse_table_plan(table_document, trio).labels)


def test_the_page(finished: Path, found: Any) -> None:
    page = (finished / "table.md").read_text(encoding="utf-8")
    assert page.startswith("# Toys\n\nNobody's paper, Table 0.\n")
    ours = 100 * found["figures"]["mergelock / ties / pairs"]
    assert f"| mergelock / ties / pairs | 3.4 | {ours:.1f} |" in page
    assert "| mine / alone | 90 to 95 |" in page
    there = 100 * found["alone"]["elsewhere"]["elsewhere"]["protected"]["polynomials"]["theirs"]
    assert f" {there:.1f} |" in page.split("tasks that no expert was tuned for")[1].split("##")[0]
    cell = cell_of(found, "theirs", "mergelock", ["mine", "both"], "ties")
    triples = page.split("## ties, triples")[1].split("##")[0]
    assert "| theirs | mine, both | " in triples
    assert f" {100 * cell['scores']['theirs-task']:.1f} |" in triples
    assert "Refused: polynomials; polynomials, after nearest_orbit." in triples


@pytest.mark.slow
def test_the_result_does_not_depend_on_workers(plan_file: Path, found: Any, tmp_path: Path) -> None:
    assert timeless(table(plan_file, out=tmp_path / "two", workers=2)) == timeless(found)


def test_what_was_lost_is_computed_again_and_nothing_else(plan_file: Path, finished: Path, tmp_path: Path) -> None:
    """Half of the cells are lost, and one is cut off as by a crash."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    expected = json.loads((out / "table.json").read_text())
    cells = sorted((out / "cells").iterdir())
    for path in cells[::2]:
        path.unlink()
    cells[1].write_bytes(cells[1].read_bytes()[:100])
    kept = {path: path.stat().st_mtime_ns for path in cells[3::2]}
    models = {path: path.stat().st_mtime_ns for path in (out / "models").iterdir()}
    again = table(plan_file, out=out, workers=1)
    assert timeless(again) == timeless(expected)
    assert sorted((out / "cells").iterdir()) == cells
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in models} == models


def test_one_checkpoint_under_two_names(trio: Path, table_document: dict[str, Any], tmp_path: Path) -> None:
    """Both would be protected at once in the same place."""
    document = copy.deepcopy(table_document)
    for item in trio.iterdir():
        (tmp_path / item.name).symlink_to(item)
    shutil.copytree(trio / "mine", tmp_path / "copy")
    document["experts"][2] |= {"path": "copy"}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(document))
    with pytest.raises(BadInput, match="experts mine and both are the same checkpoint"):
        table(plan, out=tmp_path / "out", workers=1)


@pytest.fixture(scope="module")
def chosen(trio: Path, table_document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A table whose merges choose a coefficient, and are attacked."""
    document = copy.deepcopy(table_document)
    document["protect"] = {"experts": ["mine"], "methods": ["mergelock"]}
    document["experts"] = document["experts"][:2]
    training = {"samples": 20, "learning_rates": "1e-3", "steps": 10}
    added = {"method": "task_arithmetic", "coefficient": 0.5}
    document["merges"] = [
        *({**added, "coefficient": value} for value in GRID),
        {"method": "task_arithmetic", "coefficients": GRID},
        {**added, "then": {"method": "few_shot", "settings": training}},
        {**added, "then": {"method": "unmask", "settings": {"scaling_coefficient": 0.5}}},
    ]
    document |= {"recoveries": [{"method": "layerwise_ridge", "settings": {"examples": 200}}], "partners": [1]}
    document["tasks"] = document["tasks"][:2]
    for task in document["tasks"]:
        name = task["name"].removesuffix("-task")
        task |= {"train": f"{name}-train.npz", "validation": f"{name}-validation.npz"}
    del document["published"]
    path = trio / "chosen.yaml"
    path.write_text(yaml.safe_dump(document))
    return table(path, out=tmp_path_factory.mktemp("chosen") / "out", workers=1).to_json()


GRID = [0.25, 0.5, 0.75]


def test_the_coefficient_that_does_best_on_validation_examples_is_taken(
    chosen: Any, trio: Path, tmp_path: Path
) -> None:
    """Both tasks count alike; the test examples have no say."""
    scores = []
    for value in GRID:
        out = tmp_path / f"{value}"
        experts = [(trio / name, value) for name in ("mine", "theirs")]
        ops.merge(base=trio / "base", experts=experts, method="task_arithmetic", out=out)
        scores.append(fmean(right(out, trio, name, "validation") for name in ("mine", "theirs")))
    best = GRID[int(np.argmax(scores))]
    cell = cell_of(chosen, "mine", "unprotected", ["theirs"], "task_arithmetic, best")
    assert cell["coefficient"] == best
    assert cell["scores"] == cell_of(chosen, "mine", "unprotected", ["theirs"], f"task_arithmetic, {best:g}")["scores"]
    assert max(scores) > min(scores) + 0.05, "control: it matters"
    assert "coefficient" not in cell_of(chosen, "mine", "unprotected", ["theirs"], "task_arithmetic, 0.5")


def test_attacks_on_merges(chosen: Any, trio: Path, tmp_path: Path) -> None:
    """What the commands do one after another: protect, merge, attack the merge with what it reads."""
    name = "task_arithmetic, 0.5, then few_shot"
    ops.merge(
        base=trio / "base",
        experts=[(trio / "mine", 0.5), (trio / "theirs", 0.5)],
        method="task_arithmetic",
        out=tmp_path / "merge",
    )
    ops.recover(
        tmp_path / "merge",
        base=trio / "base",
        method="few_shot",
        settings={"samples": 20, "learning_rates": "1e-3", "steps": 10},
        data=trio / "mine-train.npz",
        head=trio / "mine-head.safetensors",
        out=tmp_path / "trained",
    )
    cell = cell_of(chosen, "mine", "unprotected", ["theirs"], name)
    assert cell["scores"]["mine-task"] == pytest.approx(right(tmp_path / "trained", trio, "mine"), abs=1e-6)
    plain = cell_of(chosen, "mine", "unprotected", ["theirs"], "task_arithmetic, 0.5")
    assert cell["scores"] != plain["scores"], "control: training changes something"
    assert "scores" in cell_of(chosen, "mine", "mergelock", ["theirs"], "task_arithmetic, 0.5, then unmask")


def test_a_recovery_that_reads_examples_has_those_of_the_victim(chosen: Any, trio: Path, tmp_path: Path) -> None:
    base, released, recovered = trio / "base", tmp_path / "released", tmp_path / "recovered"
    ops.protect(trio / "mine", base=base, out=released, key=tmp_path / "key", method="mergelock", seed=0)
    examples = {"data": trio / "mine-train.npz", "settings": {"examples": 200}}
    ops.recover(released, base=base, method="layerwise_ridge", out=recovered, **examples)
    experts = [(recovered, 0.5), (trio / "theirs", 0.5)]
    ops.merge(base=base, experts=experts, method="task_arithmetic", out=tmp_path / "merge")
    cell = cell_of(chosen, "mine", "mergelock, after layerwise_ridge", ["theirs"], "task_arithmetic, 0.5")
    assert cell["scores"]["mine-task"] == pytest.approx(right(tmp_path / "merge", trio, "mine"), abs=1e-6)
    hidden = cell_of(chosen, "mine", "mergelock", ["theirs"], "task_arithmetic, 0.5")
    assert cell["scores"]["mine-task"] > hidden["scores"]["mine-task"], "control: it changes something"
