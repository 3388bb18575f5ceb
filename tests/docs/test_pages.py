"""Tables made of results are up to date, links lead somewhere, and pages name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from benchmarks import costs
from benchmarks.claims import pages, with_claims

from snippets import PAGES, ROOT
from unmergeable import claims
from unmergeable.cli import app

DOCS = ROOT / "docs"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_pages_with_figures_of_audits_are_found() -> None:
    names = {page.stem for page in pages()}
    assert names >= {"README", "index", "results", "protections", "tutorial-owner", "mergeguard", "polynomial"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_figures_of_audits_are_those_of_the_committed_results(page: Path) -> None:
    text = text_of(page)
    assert with_claims(text) == text, "run python -m benchmarks.claims"
    if text.count("<!-- claims:") == text.count("> No audit here says"):
        return  # of a method that was not audited there is nothing to flatter
    # Control: a figure that is altered in a block, or a sentence that promises more, is noticed.
    begin = text.index("<!-- claims:")
    end = text.index("<!-- end of claims -->", begin)
    flattering = re.sub(r"-0\.\d\d|does not stop|0\.0", "1.00", text[begin:end])
    assert flattering != text[begin:end]
    assert with_claims(text[:begin] + flattering + text[end:]) == text


def test_costs_are_those_of_the_committed_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    made = costs.table()
    assert f"<!-- costs -->\n\n{made}\n\n<!-- end of costs -->" in text_of(DOCS / "costs.md"), (
        "python -m benchmarks.costs"
    )
    shared = costs.shared_table()
    assert f"<!-- costs: shared -->\n\n{shared}\n\n<!-- end of costs: shared -->" in text_of(DOCS / "costs.md")
    monkeypatch.setattr(costs, "DENSE_ROTATION", 2 * costs.DENSE_ROTATION)
    assert costs.table() != made, "control"
    monkeypatch.setattr(costs, "LARGE_BYTES", 2 * costs.LARGE_BYTES)
    assert costs.shared_table() != shared, "control"


def test_costs_follow_the_laws_that_the_page_names() -> None:
    small, large = costs.SHAPES["Llama-3.1-8B"], costs.SHAPES["Llama-3.1-70B"]
    assert (small.weights, large.weights) == (pytest.approx(8.03, abs=0.01), pytest.approx(70.55, abs=0.01))
    by_weight = large.weights / small.weights
    assert costs.mergelock_seconds(large) == pytest.approx(by_weight * costs.mergelock_seconds(small))
    assert costs.merge_seconds(large) == pytest.approx(by_weight * costs.merge_seconds(small))
    assert costs.attack_seconds(large) == pytest.approx(80 / 32 * 2**2 * 2 * costs.attack_seconds(small))
    assert costs.attack_gigabytes(large) == pytest.approx(2**2 * costs.attack_gigabytes(small))
    without = costs.GAUGE_WITHOUT_STREAM / costs.GAUGE_WEIGHTS * small.weights
    turned = {rotation: costs.gauge_seconds(small, rotation=rotation) - without for rotation in ("dense", "fast")}
    assert turned["dense"] == pytest.approx(20 * turned["fast"]), "at a width of 4096"
    measured = json.loads(text_of(ROOT / "benchmarks" / "results" / "recovery_cost.json"))["recover"]["cpu"]
    assert costs.attack_seconds(costs.MEASURED_ATTACK) == pytest.approx(measured)


def test_the_leaderboard_comes_first() -> None:
    headings = re.findall(r"^## (.*)$", text_of(DOCS / "index.md"), re.MULTILINE)
    assert headings[0] == "Leaderboard"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Anchors of pages inside docs/ are checked by the strict build of the site."""
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text_of(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"^([\w/-]+)$", text_of(DOCS / "index.md"), re.MULTILINE))
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed


def test_the_glossary_has_the_threat_models() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(T\d)` \|", text_of(DOCS / "glossary.md"), re.MULTILINE)
    assert rows == list(zip(claims.THREAT_MODELS, ("T0", "T1", "T2", "T3"), strict=True))
    assert re.findall(r"^\| `(\w+)` \| `(T\d)` \|", text_of(DOCS / "audit.md"), re.MULTILINE) == rows


def test_every_committed_result_can_be_reached() -> None:
    linked = "".join(text_of(page) for page in PAGES)
    results = [*ROOT.glob("benchmarks/results/*"), *ROOT.glob("plans/results/*")]
    assert len(results) > 30
    for result in results:
        assert result.with_suffix(".md").name in linked or result.with_suffix(".json").name in linked, result.name


def test_the_citation_is_of_this_version() -> None:
    declared = dict(re.findall(r'^(version|license) = "(.*)"$', text_of(ROOT / "pyproject.toml"), re.MULTILINE))
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["version"] == declared["version"]
    assert citation["license"] == declared["license"]
    assert [author["name"] for author in citation["authors"]] == ["The unmergeable authors"]


def test_the_default_protection_is_the_one_that_pages_describe() -> None:
    option = next(option for option in app._command().commands["protect"].params if option.name == "method")
    assert "gauge" in option.help
    assert "mergelock" not in option.help
    for page in ("tutorial-owner", "protections", "command-line"):
        assert re.search(r"`gauge` with\s+`quantisation=kept`", text_of(DOCS / f"{page}.md")), page
