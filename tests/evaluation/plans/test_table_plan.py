"""Plans of tables: read, and refused in one line that says where and what."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.evaluation.plans.table_plan import VariantName, parse_table_plan, read_table_plan


@pytest.fixture
def document(table_document: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(table_document)


def test_a_plan(trio: Path, document: dict[str, Any]) -> None:
    plan = parse_table_plan(document, trio)
    assert plan.victims == ("mine", "theirs")
    assert plan.groups("mine") == (("theirs",), ("both",), ("theirs", "both"))
    assert plan.groups("theirs") == (("mine",), ("both",), ("mine", "both"))
    assert [str(variant) for variant in plan.variants] == [
        "unprotected",
        "mergelock",
        "mergelock, after nearest_orbit",
        "polynomials",
        "polynomials, after nearest_orbit",
    ]
    assert [(merge.name, merge.coefficients) for merge in plan.merges] == [
        ("task_arithmetic, 0.5", (0.5,)),
        ("ties", ()),
    ]
    entry = plan.protections[1]
    assert entry.data is None
    assert entry.given(plan.expert("mine")).data == trio / "mine-train.npz"
    assert entry.given(plan.expert("theirs")).data == trio / "theirs-train.npz"
    assert plan.protections[0].given(plan.expert("mine")).paths == ()
    assert plan.label(VariantName("mergelock"), plan.merges[1], 2) == "mergelock / ties / triples"


def test_named_groups_leave_out_the_victim(trio: Path, document: dict[str, Any]) -> None:
    document["partners"] = [["both", "mine"], ["theirs"]]
    plan = parse_table_plan(document, trio)
    assert plan.groups("mine") == (("theirs",),)
    assert plan.groups("theirs") == (("mine", "both"),)
    assert plan.sizes == (1, 2)


def test_paths_start_where_they_are_told_to(trio: Path, document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(BadInput, match="does not exist"):
        read_table_plan(path)
    assert read_table_plan(path, trio).base == trio / "base"


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("misspelt", lambda d: d.update(partnres=[1]), "no entry 'partnres'; did you mean 'partners'"),
    ("of an audit", lambda d: d.update(tiers=["T0"]), "no entry 'tiers'"),
    ("misspelt expert", lambda d: d["experts"][0].update(dtaa="x"), "experts 1 has no entry 'dtaa'; did you mean"),
    ("misspelt merge", lambda d: d["merges"][0].update(coefficent=1), "did you mean 'coefficient'"),
    ("data of a method", lambda d: d["protect"]["methods"][1].update(data="mine-train.npz"), "has no entry 'data'"),
    ("no title", lambda d: d.pop("title"), "title is missing"),
    ("no file", lambda d: d["experts"][1].update(path="nowhere"), "nowhere does not exist"),
    ("no data", lambda d: d["tasks"][0].update(test="x.npz"), "x.npz does not exist"),
    ("no test", lambda d: d["tasks"][0].pop("test"), "give either data, which is split, or test."),
    (
        "no such victim",
        lambda d: d["protect"].update(experts=["mien"]),
        "no expert is called 'mien'; did you mean 'mine'",
    ),
    ("victim twice", lambda d: d["protect"].update(experts=["mine", "mine"]), "'mine' is there twice"),
    ("no such partner", lambda d: d.update(partners=[["bth"]]), "no expert is called 'bth'; did you mean 'both'"),
    ("group too large", lambda d: d.update(partners=[3]), "3 partners are wanted, and every expert has 2 others"),
    ("no partners", lambda d: d.update(partners=[0]), "0 partners are wanted"),
    ("no number", lambda d: d.update(partners=["pairs"]), "must be a number of partners or a list of their names"),
    ("nobody", lambda d: d.update(partners=[["mine"]]), "mine has nobody to merge with"),
    ("same expert", lambda d: d["experts"][1].update(path="mine"), "is there twice"),
    ("same protection", lambda d: d["protect"].update(methods=["mergelock"] * 2), "'mergelock' is there twice"),
    (
        "same under two names",
        lambda d: d["protect"].update(methods=["mergelock", {"name": "other", "method": "mergelock"}]),
        "is there twice",
    ),
    ("no such protection", lambda d: d["protect"].update(methods=["mergelok"]), "did you mean 'mergelock'"),
    ("no such recovery", lambda d: d.update(recoveries=["kabsh"]), "did you mean 'kabsch'"),
    (
        "recovery learns",
        lambda d: d.update(recoveries=["layerwise_ridge"]),
        "layerwise_ridge reads examples; give train",
    ),
    ("no such merge", lambda d: d.update(merges=["tise"]), "no merge is called 'tise'; did you mean 'ties'"),
    ("no such setting", lambda d: d.update(merges=[{"method": "ties", "settings": {"desnity": 1}}]), "'desnity'"),
    (
        "two kinds of coefficients",
        lambda d: d["merges"][0].update(coefficients=[0.3, 0.5]),
        "give either coefficient or coefficients",
    ),
    (
        "nothing to choose on",
        lambda d: d.update(merges=[{"method": "task_arithmetic", "coefficients": [0.3, 0.5]}]),
        "task_arithmetic, best chooses a coefficient on it; give validation",
    ),
    (
        "then what",
        lambda d: d["merges"][0].update(then="nearest_orbit"),
        "then: nearest_orbit works on releases; list it among the recoveries",
    ),
    ("then learns", lambda d: d["merges"][0].update(then="few_shot"), "reads examples; give train"),
    ("merge learns", lambda d: d.update(merges=["adamerging"]), "adamerging learns from data"),
    ("merges two only", lambda d: d.update(merges=["slerp"]), "merge slerp: slerp takes 2 experts, not 3"),
    ("coefficient", lambda d: d["merges"][0].update(coefficient="much"), "coefficient: must be a number, not 'much'"),
    (
        "no coefficients",
        lambda d: d.update(merges=[{"method": "model_stock", "coefficient": 1}]),
        "give them without coefficients",
    ),
    ("nothing to read", lambda d: d["experts"][0].pop("data"), "expert mine: mergebarrier reads data; give data"),
    (
        "too few siblings",
        lambda d: (
            d["experts"][0].update(siblings=["theirs"]),
            d["protect"].update(experts=["mine"], methods=["sensitivity_shield"]),
        ),
        "expert mine: sensitivity_shield: coefficients=0.3,0.05 are 2 and siblings 1",
    ),
    ("no such task", lambda d: d["experts"][0].update(task="mine"), "no task is called 'mine'"),
    (
        "no such figure",
        lambda d: d.update(published={"mergelok / ties / pairs": 1}),
        "did you mean 'mergelock / ties / pairs'",
    ),
    ("no figure", lambda d: d.update(published={"mine / alone": [1]}), "must be a number or a text"),
    ("a list", lambda d: d.update(protect=[]), "protect: a mapping is wanted"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_what_is_wrong_is_said(
    trio: Path, document: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    parse_table_plan(document, trio)
    change(document)
    with pytest.raises(UnmergeableError) as error:
        parse_table_plan(document, trio)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_lies_on_the_hub_is_downloaded(
    trio: Path, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmergeable.evaluation.plans.plan.download", lambda name: tmp_path / name.rpartition("/")[2])
    monkeypatch.setattr("unmergeable.evaluation.plans.plan.download_data", lambda name: tmp_path / "data")
    document["experts"][0] |= {"path": "hub:owner/mine", "data": "hub:owner/mine-data#train"}
    plan = parse_table_plan(document, trio)
    local = plan.downloaded()
    assert (local.expert("mine").path, local.expert("mine").data) == (tmp_path / "mine", tmp_path / "data")
    assert local.experts[1:] == plan.experts[1:]


def test_the_documented_plan_is_one(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "tables.md").read_text(encoding="utf-8")
    text = guide.split("```yaml\n")[1].split("```")[0]
    for name in re.findall(r"[\w-]+\.(?:npz|safetensors)|expert-\w+", text):
        (tmp_path / name).touch()
    (tmp_path / "base").mkdir()
    plan = parse_table_plan(yaml.safe_load(text), tmp_path)
    assert plan.sizes == (1, 2)
    assert plan.published
