"""The page, the summary and the model card say what the result says, and say so when the audit is invalid."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from unmergeable.auditing.report import PAGE, read_audit, render_report, write_report
from unmergeable.auditing.verdict import judgement, model_card, star, summary
from unmergeable.errors import BadInput

WORST = {
    "d_star": 0.9,
    "interval": [0.85, 0.95],
    "protected": 0.2,
    "unprotected": 0.8,
    "without_victim": 0.15,
    "is_denominator_small": False,
}


def document(**worst: Any) -> dict[str, Any]:
    """A small result; ``worst`` changes what was found about the protection."""
    found = {**WORST, **worst}
    best = {"recovery": None, "merge": "ties", "coefficients": [1.0, 0.5], "uses_victim": True, "cpu_seconds": 1.5}
    trial = {**found, "rider": "theirs", "seed": 0, "attacks_tried": 7, "best": {"protected": best}}
    protection = {
        "is_control": False,
        "utility": {"expert": 0.9, "protected": 0.88, "loss": 0.02},
        "tiers": {"T0": {"worst": found, "trials": [trial]}},
        "matrix": [{"recovery": None, "merge": "ties", "score": 0.2, "attacks": 7}],
        "fronts": [
            {
                "rider": "theirs",
                "seed": 0,
                "unprotected": [[0.8, 0.7], [0.5, 0.9]],
                "protected": [[0.2, 0.7]],
                "without_victim": [[0.1, 0.9]],
            }
        ],
    }
    control = {**copy.deepcopy(protection), "is_control": True}
    line = {"protection": "identity", "seed": 0, "recovery": None, "rider": "theirs", "share": [0.0, 1.0]}
    return {
        "plan": {"base": "<base> & more"},
        "environment": {"unmergeable": "1"},
        "task": "mine",
        "kept_share": 0.95,
        "protections": {"identity": control, "lock": protection},
        "models": [{"protection": "lock", "recovery": "kabsch", "cpu_seconds": 2.0, "distance_before": None}],
        "connectivity": [{**line, "scores": {"mine": [0.1, 0.9]}}],
        "controls": [{"name": "identity", "what": "x", "value": 0.0, "bound": 0.05, "passed": True}],
        "passed": True,
        "refused": [{"protection": "lock", "recovery": "kabsch", "reason": "not that <structure>"}],
        "cells": [],
    }


@pytest.mark.parametrize(
    ("worst", "expected"),
    [
        ({}, "stops"),
        ({"interval": [0.5, 0.99]}, "hinders"),
        ({"interval": [0.1, 0.99]}, "does not stop"),
        ({"is_denominator_small": True}, "cannot be judged"),
    ],
)
def test_a_judgement_is_made_from_the_lower_end(worst: dict[str, Any], expected: str) -> None:
    found = document(**worst)
    assert judgement(found["protections"]["lock"]["tiers"]["T0"]) == expected
    assert judgement({"worst": None}) == "cannot be judged"
    if expected != "cannot be judged":
        assert f"It {expected} ordinary merging" in summary(found)[0]


def test_the_same_figures_everywhere() -> None:
    found = document()
    sentence = (
        "lock costs 2.0 points on its own task. It stops ordinary merging: the best merge gets 20 %, against 80 % "
        "unprotected and 15 % without the expert (D* = 0.90, 95 % interval 0.85 to 0.95)."
    )
    assert summary(found) == [sentence]
    page = render_report(found)
    for text in (sentence, star(WORST), "ties with 1 and 0.5", "&lt;base&gt; &amp; more", "not that &lt;structure&gt;"):
        assert text in page
    assert f"| lock | 2.0 | {star(WORST)} |" in model_card(found)
    assert "nvalid" not in page + model_card(found)


def test_an_invalid_audit_says_so_first() -> None:
    found = document()
    found["controls"][0] |= {"value": 0.3, "passed": False}
    found["passed"] = False
    failed = "control identity is 0.30, allowed 0.05"
    assert summary(found)[0] == f"INVALID: {failed}. The figures below mean nothing."
    assert failed in model_card(found)
    page = render_report(found)
    assert page.index(failed) < page.index("lock costs")


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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_sticks_out_in_a_browser(tmp_path: Path, width: int) -> None:
    """Only what may be scrolled by itself is wider than the window. The control is a page with a wide element."""
    probe = (
        "<script>window.onload = () => { document.title = [...document.querySelectorAll('main *')].filter("
        "e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > innerWidth + 1).length; }</script>"
    )
    page = render_report(document())

    def sticking_out(text: str) -> int:
        file = tmp_path / "page.html"
        file.write_text(text.replace("</body>", f"{probe}</body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--dump-dom", "--virtual-time-budget=2000"]
        shown = subprocess.run(
            [
                "chromium",
                *flags,
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={width},900",
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        found = re.search(r"<title>(\d+)</title>", shown.stdout)
        assert found is not None
        return int(found[1])

    assert sticking_out(page) == 0
    assert sticking_out(page.replace("</main>", "<div style='width: 3000px'>wide</div></main>")) == 1
