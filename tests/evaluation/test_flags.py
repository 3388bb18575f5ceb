"""What is held against a figure, and that it takes a claim away."""

from __future__ import annotations

from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.documents import document
from unmergeable.attacks.base import NOT_RECOGNISED
from unmergeable.evaluation.flags import FLAGS, is_on_edge, is_recognised
from unmergeable.evaluation.judge import Contest, Job, ScoredAttack
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.plans.entries import ExpertEntry, MergeEntry, ProtectionEntry
from unmergeable.evaluation.report.page import render_report
from unmergeable.evaluation.report.verdict import judgement, summary
from unmergeable.evaluation.results import AuditResult, Trial
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.protections import PROTECTIONS


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are not turned into SVG, which is most of a page's cost."""
    monkeypatch.setattr("unmergeable.page.charts.svg", lambda figure, title: "<svg></svg>")


GRID = [(x, y) for x in (0.2, 0.5, 1.0, 1.5) for y in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(
    ("point", "tried", "expected"),
    [
        ((1.5, 0.5), GRID, True),
        ((0.2, 0.5), GRID, True),
        ((1.0, 1.0), GRID, True),
        ((1.0, 0.0), GRID, False),  # at 0 a model is left out: there is nothing beyond
        ((0.5, 0.5), GRID, False),
        ((1.5, 0.5), [*GRID, (2.0, 0.5)], False),
        ((1.0, 1.0), [(1.0, 1.0), (0.5, 1.0)], True),
        ((0.5, 1.0), [(0.3, 1.0), (0.5, 1.0), (1.0, 1.0)], False),  # one value is no axis
        (None, [None], False),
    ],
)
def test_an_edge_is_where_others_lie_on_one_side(point: Any, tried: Any, expected: bool) -> None:
    assert is_on_edge(point, tried) == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"distance_after": 0.02, "confidence": 0.9}, True),
        ({"distance_after": 0.2, "confidence": 0.9}, False),  # ten times the expert's distance
        ({"distance_after": 0.02, "confidence": 0.0}, False),
        ({"distance_after": None, "confidence": None}, False),
        ({"method": "block_regression", "findings": {}}, True),
        ({"method": "block_regression", "findings": {"result": NOT_RECOGNISED}}, False),
        ({}, False),
    ],
)
def test_what_is_far_or_unsure_was_not_recognised(facts: dict[str, Any], expected: bool) -> None:
    assert is_recognised(facts, 0.02) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "stops"),
        (["not_recognised"], "is not shown to stop"),
        (["uncertain_denominator"], "cannot be judged"),
        (["edge", "few_examples", "bar_decides"], "stops"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_flag_takes_a_claim_away_or_stands_beside_it(flags: list[str], expected: str) -> None:
    result = AuditResult.from_json(document(flags=flags))
    assert judgement(result.protections["lock"].tiers[ThreatModel.OFF_THE_SHELF]) == expected
    page, terminal = unescape(render_report(result)), "\n".join(summary(result))
    for flag, meaning in FLAGS.items():
        assert (meaning in terminal) == (flag in flags)
        assert (meaning in page) == (flag in flags)
    assert result.to_json()["protections"]["lock"]["tiers"]["T0"]["worst"]["flags"] == flags


def test_older_results_have_no_flags() -> None:
    found = document()
    worst = found["protections"]["lock"]["tiers"]["T0"]["worst"]
    assert Trial.from_json(worst).flags == ()
    assert Trial.from_json(worst).bars == ()


def contest(**variant: Any) -> Contest:
    """One merge of one release of `lock`, far from the base."""
    nobody: Any = None
    release = Variant("lock", 0, None, None, 0.0, {"distance_after": 0.2, "confidence": 0.9}, **variant)
    rider = ExpertEntry("theirs", Path("theirs"), "theirs")
    attack = ScoredAttack(Job(release, rider, MergeEntry("linear", "linear", {}), nobody), None, nobody, nobody)
    return Contest("theirs", "mine", "theirs", np.ones(4), np.ones(4), (attack,))


def test_what_keeps_the_basis_hides_nothing() -> None:
    model = ThreatModel.WHITE_BOX
    assert contest(keeps_basis=True).is_recognised(("lock", 0), model)
    unprotected = {"findings": {"result": NOT_RECOGNISED}}
    far = contest()
    (attack,) = far.attacks
    assert attack.job.variant is not None
    lost = replace(attack, job=replace(attack.job, variant=replace(attack.job.variant, facts=unprotected)))
    assert not replace(far, attacks=(lost,)).is_recognised(("lock", 0), model)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("collapse", True),
        ("mergeguard", True),
        ("sensitivity_shield,collapse", True),
        ("mergelock", False),
        ("collapse,gauge", False),
        ("taylor_mlp", False),
    ],
)
def test_which_protections_keep_the_basis(method: str, expected: bool) -> None:
    assert ProtectionEntry(method, method, {}).keeps_basis == expected


def test_nobody_knows_what_a_method_of_another_package_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type("Stranger", (PROTECTIONS["collapse"],), {"__module__": "another.package", "name": "stranger"})
    monkeypatch.setitem(PROTECTIONS._known, "stranger", stranger)
    assert not ProtectionEntry("stranger", "stranger", {}).keeps_basis
