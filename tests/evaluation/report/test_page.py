"""The page, the summary and the model card say what the result says, and say so when the audit is invalid."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from evaluation.documents import analysed, document
from unmergeable.errors import BadInput
from unmergeable.evaluation.report.page import PAGE, render_report, write_report
from unmergeable.evaluation.report.verdict import as_markdown, judgement, model_card, summary
from unmergeable.evaluation.results import AuditResult, Verdicts, read_audit, star
from unmergeable.evaluation.threat_models import ThreatModel


def typed(found: dict[str, Any]) -> AuditResult:
    return AuditResult.from_json(found)


def page_of(found: dict[str, Any]) -> str:
    return render_report(typed(found))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are not turned into SVG, which is most of a page's cost: for tests that look at its words."""
    monkeypatch.setattr("unmergeable.page.charts.svg", lambda figure, title: "<svg></svg>")


BEST_STAR = star(typed(document()).protections["lock"].tiers[ThreatModel.OFF_THE_SHELF].worst)


def test_a_name_stands_in_the_card_as_it_is() -> None:
    assert as_markdown("sensitivity_shield, 50 %") == "sensitivity_shield, 50 %"
    assert as_markdown("a|b\n| c |") == r"a\|b \| c \|"
    assert as_markdown("<img> [x](y) `*`") == r"\<img\> \[x\](y) \`\*\`"


@pytest.mark.parametrize(
    ("worst", "expected"),
    [
        ({}, "stops"),
        ({"interval": [0.5, 0.99]}, "hinders"),
        ({"interval": [0.1, 0.99]}, "is not shown to stop"),
        ({"d_star": 0.1, "interval": [0.0, 0.99]}, "does not stop"),
        ({"is_denominator_small": True}, "cannot be judged"),
    ],
)
def test_a_judgement_is_made_from_the_lower_end(worst: dict[str, Any], expected: str) -> None:
    found = document(**worst)
    assert judgement(typed(found).protections["lock"].tiers[ThreatModel.OFF_THE_SHELF]) == expected
    assert judgement(Verdicts(worst=None, trials=())) == "cannot be judged"
    if expected != "cannot be judged":
        assert f"It {expected} ordinary merging" in summary(typed(found))[0]


@pytest.mark.usefixtures("undrawn")
def test_the_same_figures_everywhere() -> None:
    found = document()
    sentence = (
        "lock costs 2.0 points on its own task. It stops ordinary merging (off_the_shelf: D* = 0.90, 95 % interval "
        "0.85 to 0.95): the best merge gets 20 %, against 80 % unprotected and 15 % without the expert."
    )
    assert summary(typed(found)) == [sentence]
    page = page_of(found).replace("<strong>lock</strong>", "lock")
    for text in (sentence, BEST_STAR, "ties with 1 and 0.5", "&lt;base&gt; &amp; more", "not that &lt;structure&gt;"):
        assert text in page
    assert f"| lock | 2.0 | {BEST_STAR} |" in model_card(typed(found))
    assert "nvalid" not in page + model_card(typed(found))


@pytest.mark.usefixtures("undrawn")
def test_a_heat_map_inks_what_was_stolen() -> None:
    """Most for the best attack of all, none for what can be had without the expert."""
    found = document()
    cells = [("none", 0.15), ("kabsch", 0.5), ("nearest_orbit", 0.85), ("taylor_inversion", None)]
    found["protections"]["lock"]["matrix"] = [
        {"recovery": None if name == "none" else name, "merge": "ties", "score": score, "attacks": 1}
        for name, score in cells
    ]
    (section,) = re.findall(r'id="matrix".*?</table>', page_of(found), flags=re.DOTALL)
    head, body = section.split("<tbody>")
    assert re.findall(r'class="number">([^<]+)<', head) == [name for name, _ in cells]
    (row,) = re.findall(r'<th scope="row">lock</th>(.*?)</tr>', body, flags=re.DOTALL)
    assert re.findall(r"43, ([\d.]+)\)\">([^<]+)<", row) == [
        ("0.00", "15.0"),
        ("0.30", "50.0"),
        ("0.60", "85.0"),
        ("0.00", "–"),
    ]


@pytest.mark.usefixtures("undrawn")
def test_what_was_refused_for_one_reason_stands_together() -> None:
    found = document()
    found["refused"] = [
        {"protection": name, "recovery": recovery, "merge": merge, "reason": reason}
        for name, recovery, merge, reason in (
            ("lock", "kabsch", None, "no heads"),
            ("identity", "kabsch", None, "no heads"),
            ("lock", None, "ties", "other names"),
            (None, None, "ties", "other names"),
            ("lock", "kabsch", "ties", "other shapes"),
        )
    ]
    found["refused"][-1]["samples"] = 16
    page = page_of(found)
    for line in (
        "kabsch of lock, unprotected: no heads",
        "ties of lock, what is there without the expert: other names",
        "training after ties after kabsch of lock: other shapes",
    ):
        assert f"<li>{line}</li>" in page


@pytest.mark.usefixtures("undrawn")
def test_an_invalid_audit_says_so_first() -> None:
    found = document()
    found["controls"][0] |= {"value": 0.3, "passed": False}
    found["passed"] = False
    failed = "control identity is 0.30, allowed 0.05"
    assert summary(typed(found))[0] == f"INVALID: {failed}. The figures below mean nothing."
    assert failed in model_card(typed(found))
    page = page_of(found)
    assert page.index(failed) < page.index("lock</strong> costs")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text(json.dumps(document()))
    page = write_report(tmp_path)
    text = page.read_text()
    assert page == tmp_path / PAGE
    assert re.findall(r"<script|<link|@import|src=\"http|url\(http", text) == []
    assert text == write_report(tmp_path).read_text(), "made again it is the same"
    pictures, tables = text.count("<figure>"), text.count("The same as a table")
    assert pictures == tables == 2


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_there_must_be_a_result(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "audit.json").write_text(content)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / "audit.json"))):
        read_audit(tmp_path)


@pytest.fixture(scope="module")
def page() -> str:
    """A page with everything on it."""
    return page_of(analysed())


def test_every_picture_has_its_table_and_a_name(page: str) -> None:
    # Fronts, line; of two protections and two forms: distances, directions, barrier, landscapes, map, scaling, noise.
    assert page.count("<figure>") == page.count("The same as a table") == 1 + 1 + 2 + 2 + 1 + 4 + 1 + 2 + 2
    assert page.count('<svg role="img" aria-label="') == page.count("<figure>")
    anchors = re.findall(r'<h2 id="([a-z]+)"', page)
    assert len(anchors) == len(set(anchors)) > 12
    assert re.findall(r'<a href="#([a-z]+)">', page) == anchors
    assert page.count("<nav") == 1
    assert "parts, line of strange, as released: another &lt;structure&gt;" in page


@pytest.mark.usefixtures("undrawn")
def test_parts_that_are_not_there_leave_no_heading() -> None:
    found = analysed()
    for model in found["analyses"]["models"]:
        model["noise"] = model["landscape"] = None
    page = page_of(found)
    for heading, is_there in (("noise", False), ("landscapes", False), ("scaling", True), ("refused", True)):
        assert (f'id="{heading}"' in page) == is_there
    assert "so only the first is here" not in page
    found["analyses"]["models"] = [model for model in found["analyses"]["models"] if model["form"] == "raw"]
    assert "so only the first is here" in page_of(found)
    found["refused"] = []
    assert 'id="refused"' not in page_of(found)
    assert 'id="analyses"' not in page_of(document())


@pytest.mark.usefixtures("undrawn")
def test_as_many_attackers_as_there_are() -> None:
    """An attacker who learns from data gets a column, and the page no longer says that nobody did."""
    found = document()
    assert "Nobody here had labelled" in page_of(found)
    for entry in found["protections"].values():
        trial = {**entry["tiers"]["T0"]["worst"], "samples": 16}
        entry["tiers"]["T2"] = {"worst": trial, "trials": [trial]}
    page = page_of(found)
    assert "<td>few_shot, 16 labelled</td>" in page
    assert f"{BEST_STAR}, 16 labelled</span>" in page
    assert "few_shot: D* against an attacker who has labelled examples as well" in page
    assert "Nobody here had labelled" not in page


@pytest.mark.usefixtures("undrawn")
def test_refusals_of_one_model_stand_together() -> None:
    page = page_of(document())
    assert "<li>linear after kabsch, slerp after kabsch of lock: not that &lt;structure&gt;</li>" in page


@pytest.mark.usefixtures("undrawn")
def test_the_best_attack_can_be_done_by_hand() -> None:
    page = page_of(document())
    assert "--expert release=1 --expert t=0.5 --method ties --out merged" in page


@pytest.mark.usefixtures("undrawn")
def test_how_tasks_were_scored_is_said() -> None:
    tasks = {"mine": {"kind": "lm_eval", "lm_eval": "<version>"}, "theirs": {"kind": "classification"}}
    page = page_of({**document(), "tasks": tasks})
    assert "Task mine: lm_eval, lm_eval &lt;version&gt;." in page
    assert "Task theirs: classification." in page


def test_without_its_cells_the_result_still_makes_a_page() -> None:
    """As it is committed."""
    found = document()
    del found["cells"]
    assert "550 sets of weights" in page_of({**found, "scored": 550})


PROBE = """
const box = element => element.getBoundingClientRect();
const meet = (a, b) => a.right > b.left + 1 && b.right > a.left + 1 && a.bottom > b.top + 1 && b.bottom > a.top + 1;
const crossing = boxes => boxes.flatMap((a, n) => boxes.slice(n + 1).filter(b => meet(a, b))).length;
window.onload = () => {
  document.querySelectorAll('details').forEach(one => { one.open = true; });
  const pictures = [...document.querySelectorAll('figure svg:not(.key)')];
  document.title = JSON.stringify({
    wide: [...document.querySelectorAll('main *')].filter(
      e => !e.closest('.scroll, svg, .away, .skip') && box(e).right > innerWidth + 1).length,
    cut: pictures.flatMap(svg => [...svg.querySelectorAll('text')].filter(t =>
      box(t).left < box(svg).left - 1 || box(t).right > box(svg).right + 1 ||
      box(t).top < box(svg).top - 1 || box(t).bottom > box(svg).bottom + 1)).length,
    over: pictures.reduce((count, svg) =>
      count + crossing([...svg.querySelectorAll('[id^="matplotlib.axis"] text')].map(box)), 0),
    blocks: crossing([...document.querySelectorAll('main > *:not(.skip), .pictures > div')].filter(
      e => !e.classList.contains('pictures')).map(box)),
  });
};
"""

CONTROLS = (
    ("</main>", "<div style='width: 3000px'>wide</div></main>"),
    ('<g id="figure_1">', '<g id="figure_1"><text x="-90" y="20">cut off</text>'),
    ('<g id="matplotlib.axis_1">', '<g id="matplotlib.axis_1"><text y="50">one</text><text y="52">two</text>'),
    ("</main>", "<p style='margin-top: -3rem'>over</p></main>"),
)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_sticks_out_or_overlaps_in_a_browser(tmp_path: Path, width: int, page: str) -> None:
    """With all tables open. Only what may be scrolled by itself is wider than the window. Each check has a control."""

    def measured(text: str) -> Any:
        file = tmp_path / "page.html"
        file.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--dump-dom", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}"]
        shown = subprocess.run(
            ["chromium", *flags, f"--window-size={width},900", file.as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        found = re.search(r"<title>(.*)</title>", shown.stdout)
        assert found is not None
        return json.loads(found[1])

    assert measured(page) == {"wide": 0, "cut": 0, "over": 0, "blocks": 0}
    for place, broken in CONTROLS:
        page = page.replace(place, broken, 1)
    assert min(measured(page).values()) > 0
