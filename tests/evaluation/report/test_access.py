"""What is said of who only runs a release, and of who trains it on."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.documents import WORST, document
from unmergeable.evaluation.report.page import render_report
from unmergeable.evaluation.report.verdict import model_card, summary
from unmergeable.evaluation.results import AuditResult

STUDENT = {
    "recovery": "distil", "merge": "ties", "coefficients": [1.0, 1.0], "uses_victim": True, "steps": 240,
    "examples": 640, "cpu_seconds": 23.04,
}  # fmt: skip
TRAINED = {
    "recovery": None, "merge": None, "coefficients": None, "uses_victim": True, "samples": 100, "learning_rate": 1e-4,
    "steps": 200, "examples": 1100, "cpu_seconds": 50.0,
}  # fmt: skip
EQUALLY = {**TRAINED, "uses_victim": False, "start": "theirs", "cpu_seconds": 49.0}


def audited(excess: float = 0.03) -> AuditResult:
    """The small result, with two attackers more, who get through."""
    found = document()
    trial = {**WORST, "d_star": 0.0, "interval": [-0.1, 0.1], "protected": 0.8, "rider": "theirs", "seed": 0}
    trial |= {"attacks_tried": 3}
    running = {**trial, "best": {"protected": STUDENT}}
    training = {**trial, "samples": 100, "protected": 0.85, "without_victim": 0.6}
    training |= {"best": {"protected": TRAINED, "without_victim": EQUALLY}}
    for name in ("identity", "lock"):
        tiers = {"black_box": running, "retrain": training}
        found["protections"][name]["tiers"] |= {tier: {"worst": t, "trials": [t]} for tier, t in tiers.items()}
    found["protections"]["lock"]["excess"] = [
        {"rider": "theirs", "seed": 0, "value": excess, "interval": [excess - 0.02, excess + 0.02],
         "weights": 0.8 + excess, "black_box": 0.8},
    ]  # fmt: skip
    return AuditResult.from_json(found)


def test_the_result_comes_back_as_it_was() -> None:
    result = audited()
    assert AuditResult.from_json(result.to_json()) == result
    excess = result.protections["lock"].worst_excess
    assert excess is not None
    assert excess.weights - excess.black_box == pytest.approx(excess.value)
    assert AuditResult.from_json(document()).protections["lock"].excess is None
    assert "excess" not in AuditResult.from_json(document()).to_json()["protections"]["lock"]


def test_the_sentence_says_what_it_costs_and_what_it_is() -> None:
    (sentence,) = (line for line in summary(audited()) if line.startswith("lock"))
    assert "It stops ordinary merging" in sentence
    assert (
        "Whoever only runs it (black_box) gets 80 % by a student of its answers, against 15 % without the expert "
        "(240 steps on at most 640 examples, 23.0 CPU seconds). Its weights give 3.0 points more than that (95 % "
        "interval 1.0 to 5.0)." in sentence
    )
    assert "is no merge and probably cannot be stopped: that gets 85 % (200 steps on at most 1100 examples" in sentence
    assert "the same training without the expert from theirs 60 % (200 steps" in sentence
    assert "Its weights give no more than that (-1.0 points" in summary(audited(-0.01))[0]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmergeable.page.charts.svg", lambda figure, title: "<svg></svg>")


@pytest.mark.usefixtures("undrawn")
def test_every_table_has_their_columns() -> None:
    result = audited()
    page, card = render_report(result), model_card(result)
    head = "excess of weights over running it, points"
    assert result.table.columns[-3:] == ("black_box", "retrain", head)
    assert result.table.rows[0][-1] == "+3.0, 95 % interval +1.0 to +5.0"
    for text in (page, card):
        assert "black_box: D* against an attacker who only runs the release" in text
        assert "retrain: D* against an attacker who trains its own task into the release" in text
        assert head in text
        assert "+3.0, 95 % interval +1.0 to +5.0" in text
    assert "without the expert, trained equally from theirs: 200 steps on at most 1100 examples" in page
    assert "the release itself, then training on 100 examples" in page
    assert "leave the expert alone" not in page
    for row in card.splitlines()[:3]:
        assert row.count("|") == 1 + len(result.table.columns)


@pytest.mark.usefixtures("undrawn")
def test_without_them_nothing_is_said() -> None:
    """The control."""
    result = AuditResult.from_json(document())
    said: Any = [*summary(result), render_report(result), model_card(result)]
    assert not any("black_box" in text or "retrain" in text or "excess" in text for text in said)
