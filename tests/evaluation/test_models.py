"""Which models are made, and what whoever makes them reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from unmergeable.attacks import AttackRequirements, LayerwiseRidge, Whose
from unmergeable.data import Fields
from unmergeable.errors import BadInput
from unmergeable.evaluation import models
from unmergeable.evaluation.models import Variant, make_variants
from unmergeable.evaluation.plans.audit_plan import AuditPlan, read_plan
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.progress import silent

RELEASED = 5
"""The expert, the shrunk one, two that are planted, and the protected one."""


@dataclass(frozen=True)
class Recovering:
    """``ops.recover`` that writes nothing and remembers what it was given."""

    calls: list[Mapping[str, Any]]
    facts: dict[str, Any] = field(default_factory=lambda: {"cpu_seconds": 1.0})

    def __call__(self, start: Path, *, out: Path, **given: Any) -> Any:
        self.calls.append({"start": start, **given})
        out.mkdir(parents=True)
        (out / "made").write_text(out.name)
        return SimpleNamespace(to_json=lambda: dict(self.facts))

    @property
    def read(self) -> list[str]:
        return [Path(call["data"]).name for call in self.calls if "data" in call]


def stub_facts(expert: Path, out: Path) -> Mapping[str, Any]:
    Recovering([])(expert, out=out)
    return {}


@pytest.fixture
def recovering(monkeypatch: pytest.MonkeyPatch) -> Recovering:
    stub = Recovering([])
    monkeypatch.setattr(models.ops, "recover", stub)
    monkeypatch.setattr(models.ops, "protect", lambda expert, *, out, **given: Recovering([])(expert, out=out))
    monkeypatch.setattr(models, "output_gap", lambda *read: {})
    monkeypatch.setattr(models, "distance_with_key", lambda *read: 1.0)
    monkeypatch.setattr(models, "write_planted", lambda expert, base, out, *drawn: stub_facts(expert, out))
    monkeypatch.setattr(models, "write_control", lambda expert, *, out, **given: Recovering([])(expert, out=out))
    return stub


def reads(monkeypatch: pytest.MonkeyPatch, whose: Whose) -> None:
    needed = AttackRequirements(needs=("base", "data"), examples=whose)
    monkeypatch.setattr(LayerwiseRidge, "requirements", lambda self: needed)


def planned(plan_file: Path, document: dict[str, Any], **more: Any) -> AuditPlan:
    """The plan with a second free-rider, who has another task."""
    document["experts"].append({"name": "other", "path": "theirs", "task": "other-task"})
    other = {**document["tasks"][1], "name": "other-task", "train": "mine-validation.npz"}
    document["tasks"] = [{**task, "train": f"{task['name'][:-5]}-train.npz"} for task in document["tasks"]] + [other]
    document |= {"recoveries": ["layerwise_ridge"], "connectivity": 0, **more}
    plan_file.write_text(yaml.safe_dump(document))
    return read_plan(plan_file)


def made(plan: AuditPlan, folder: Path) -> list[Variant]:
    return make_variants(plan, folder, {path: str(path) for path in plan.paths}, silent)


def riders(variants: Iterable[Variant]) -> list[str | None]:
    return [variant.rider for variant in variants if variant.recovery]


def test_own_inputs_are_each_free_riders_own(
    plan_file: Path, document: dict[str, Any], recovering: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads(monkeypatch, "own")
    plan = planned(plan_file, document)
    variants = made(plan, tmp_path / "models")
    assert riders(variants) == ["theirs", "other"] * RELEASED
    assert recovering.read == ["theirs-train.npz", "mine-validation.npz"] * RELEASED
    mine = variants[1]
    assert [mine.is_had_by(rider) for rider in plan.riders] == [True, False]
    assert all(variants[0].is_had_by(rider) for rider in plan.riders)
    assert len({v.checkpoint.path for v in variants if v.checkpoint is not None}) == len(variants)


def test_a_protection_is_given_what_the_plan_names_of_the_owners(
    plan_file: Path, document: dict[str, Any], recovering: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, Any]] = []

    def protect(expert: Path, *, out: Path, **more: Any) -> Any:
        given.append(more)
        return Recovering([])(expert, out=out)

    monkeypatch.setattr(models.ops, "protect", protect)
    owned = {"data": "mine-train.npz", "head": "mine-head.safetensors"}
    others = [{"name": name, "method": "collapse", **owned} for name in ("alone", "beside")]
    others[1]["generic"] = "mine-validation.npz"
    document["protect"]["methods"] = others
    plan = planned(plan_file, document, threat_models=["off_the_shelf"], recoveries=[])
    variants = made(plan, tmp_path / "models")
    folder = plan_file.parent
    assert [(more["data"], more["head"], more["generic"]) for more in given] == [
        (folder / owned["data"], folder / owned["head"], None),
        (folder / owned["data"], folder / owned["head"], folder / "mine-validation.npz"),
    ]
    paths = {v.protection: v.checkpoint.path for v in variants if v.protection in ("alone", "beside") and v.checkpoint}
    assert paths["alone"] != paths["beside"], "what it reads is part of what is made"


@pytest.mark.parametrize(
    ("attacker", "confidence", "regressed"),
    [
        ("quick-1", 0.995, {"somebody's"}),
        ("quick-1", 0.9, {"identity", "scale", "planted", "planted_structure", "mergelock", "somebody's"}),
        ("full-1", 0.995, {"identity", "scale", "planted", "planted_structure", "mergelock", "somebody's"}),
    ],
)
def test_what_costs_most_is_left_out_where_a_basis_was_found(
    plan_file: Path,
    document: dict[str, Any],
    recovering: Recovering,
    tmp_path: Path,
    attacker: str,
    confidence: float,
    regressed: set[str],
) -> None:
    """What was done is known there, or a control tells; a release of somebody else's is always asked what it does."""
    del document["merges"], document["recoveries"]
    document["protect"]["methods"].append({"name": "somebody's", "checkpoint": "mine"})
    plan_file.write_text(yaml.safe_dump(document | {"attacker": attacker}))
    recovering.facts["confidence"] = confidence
    variants = made(read_plan(plan_file), tmp_path / "models")
    assert {variant.protection for variant in variants if variant.recovery == "block_regression"} == regressed


def test_controls_of_merging_are_not_taught_from(
    plan_file: Path, document: dict[str, Any], recovering: Recovering, tmp_path: Path
) -> None:
    """Who only runs a release makes students of the expert and of what is protected; one may start from its own."""
    own = {"name": "on", "method": "distil", "settings": {"start": "source"}}
    more = {"recoveries": ["distil", own], "threat_models": ["off_the_shelf", "black_box"]}
    variants = made(planned(plan_file, document, **more), tmp_path / "models")
    students = [variant for variant in variants if variant.recovery]
    assert {student.threat_model for student in students} == {ThreatModel.BLACK_BOX}
    assert [(student.protection, student.recovery, student.rider) for student in students] == [
        (protection, recovery, rider)
        for protection in ("identity", "mergelock")
        for recovery in ("distil", "on")
        for rider in ("theirs", "other")
    ]
    starts = [[path.name for path in call["sources"]] for call in recovering.calls[:4]]
    assert starts == [[], [], ["theirs"], ["theirs"]]  # both free-riders have the same model here


def test_the_defended_tasks_examples_are_the_same_for_all(
    plan_file: Path, document: dict[str, Any], recovering: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what reads those makes one model for everybody, and needs the threat model that has them."""
    reads(monkeypatch, "defended")
    with pytest.raises(BadInput, match="needs data, which threat model unlabelled"):
        planned(plan_file, document)
    plan = read_plan_with_data(plan_file, document)
    variants = made(plan, tmp_path / "models")
    assert riders(variants) == [None] * RELEASED
    assert recovering.read == ["mine-train.npz"] * RELEASED


def read_plan_with_data(plan_file: Path, document: dict[str, Any]) -> AuditPlan:
    plan_file.write_text(yaml.safe_dump({**document, "threat_models": ["white_box", "unlabelled"]}))
    return read_plan(plan_file)


def test_own_inputs_are_a_file_of_their_own(
    plan_file: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads(monkeypatch, "own")
    del (document["tasks"][1])["validation"], (document["tasks"][1])["test"]
    document["tasks"][1]["data"] = "theirs-train.npz"
    document["recoveries"] = ["layerwise_ridge"]
    plan_file.write_text(yaml.safe_dump(document))
    with pytest.raises(BadInput, match="theirs-task: recovery layerwise_ridge reads examples; give them as train"):
        read_plan(plan_file)


def test_inputs_are_read_by_the_names_that_the_task_has_for_them(
    plan_file: Path, document: dict[str, Any], recovering: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads(monkeypatch, "own")
    plan = planned(plan_file, document)
    kind = replace(plan.task("theirs-task").kind, image="picture")  # type: ignore[call-arg]
    tasks = tuple(replace(task, kind=kind) if task.name == "theirs-task" else task for task in plan.tasks)
    made(replace(plan, tasks=tasks), tmp_path / "models")
    assert [call["fields"] for call in recovering.calls[:2]] == [Fields(image="picture"), Fields()]
