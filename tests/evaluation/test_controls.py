"""Controls hold for an attacker who is worth the name, and each fails for one who is weakened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.documents import WORST
from unmergeable.evaluation.audits import audit, run_audit
from unmergeable.evaluation.controls import controls, doubted
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.names import IDENTITY, NOTHING, PLANTED, PLANTED_STRUCTURE, SCALE
from unmergeable.evaluation.plans.audit_plan import Grid, read_plan
from unmergeable.evaluation.report.verdict import judgement
from unmergeable.evaluation.results import Control, ProtectionResult
from unmergeable.evaluation.threat_models import ThreatModel

FOUND = {SCALE: 0.05, PLANTED: 0.04, PLANTED_STRUCTURE: 0.04, NOTHING: 0.97, IDENTITY: 0.0}


def protection(d_star: float, tier: str = "T1", luck: float = 0.0, **scores: float) -> ProtectionResult:
    """``luck``: standard error of the test."""
    trial = {**WORST, "rider": "theirs", "seed": 0, "attacks_tried": 3, **scores, "d_star": d_star}
    trial["test_error"] = luck
    utility = {"expert": 0.8, "protected": 0.8, "loss": 0.0}
    tiers = {tier: {"worst": trial, "trials": [trial]}}
    return ProtectionResult.from_json(
        {"is_control": True, "utility": utility, "tiers": tiers, "matrix": [], "fronts": []}
    )


def variant(name: str, recovery: str | None = None, *, has_key: bool = False, **facts: Any) -> Variant:
    return Variant(name, 0, recovery, None, 0.0, facts, has_key=has_key)


def checked(variants: list[Variant] | None = None, **changed: float) -> dict[str, Control]:
    protections = {name: protection(d_star) for name, d_star in {**FOUND, **changed}.items()}
    return {control.name: control for control in controls(protections, variants or [])}


def test_all_hold_for_an_attacker_who_is_strong_enough() -> None:
    found = checked(lock=0.05, variants=[variant("lock", has_key=True)])
    assert set(found) == {SCALE, PLANTED, PLANTED_STRUCTURE, NOTHING, "exact: lock"}
    assert all(control.passed for control in found.values())


@pytest.mark.parametrize(
    ("name", "d_star"), [(SCALE, 0.11), (SCALE, -0.11), (PLANTED, 0.06), (PLANTED_STRUCTURE, 0.5), (NOTHING, 0.94)]
)
def test_each_can_fail(name: str, d_star: float) -> None:
    assert [control.name for control in checked(**{name: d_star}).values() if not control.passed] == [name]


@pytest.mark.parametrize(
    ("name", "d_star", "luck", "passed", "undecided"),
    [
        (SCALE, 0.3, 0.09, False, False),  # 2.2 standard errors beyond the bound
        (SCALE, 0.3, 0.11, True, True),
        (SCALE, -0.3, 0.11, True, True),
        (SCALE, 0.05, 0.25, True, False),  # within the bound it holds, however wide the interval
        (NOTHING, 0.8, 0.07, False, False),
        (NOTHING, 0.8, 0.08, True, True),
        (PLANTED, 0.3, 0.5, False, False),  # the same function in other weights: luck does not part them
        (PLANTED_STRUCTURE, 0.3, 0.5, False, False),
    ],
)
def test_what_may_be_luck_is_undecided(name: str, d_star: float, luck: float, passed: bool, undecided: bool) -> None:
    protections = {kind: protection(value) for kind, value in FOUND.items()} | {name: protection(d_star, luck=luck)}
    (found,) = (control for control in controls(protections, []) if control.name == name)
    assert (found.passed, found.undecided) == (passed, undecided)


@pytest.mark.parametrize(("area", "passed"), [(0.01, True), (0.06, False), (0.3, False)])
@pytest.mark.parametrize("name", [PLANTED, PLANTED_STRUCTURE])
def test_what_one_share_decides_is_judged_over_all(name: str, area: float, passed: bool) -> None:
    protections = {kind: protection(value) for kind, value in FOUND.items()} | {name: protection(0.08, area=area)}
    (found,) = (control for control in controls(protections, []) if control.name == name)
    assert found.passed == passed


def test_under_an_undecided_control_nobody_is_said_to_be_stopped() -> None:
    strong = {"lock": protection(0.97, luck=0.01)}
    before, after = (each["lock"].tiers[ThreatModel.WHITE_BOX] for each in (strong, doubted(strong)))
    assert judgement(before) == "stops"
    assert judgement(after) == "is not shown to stop"
    weak = doubted({"lock": protection(0.0)})["lock"].tiers[ThreatModel.WHITE_BOX]
    assert judgement(weak) == "does not stop", "what got through got through"


def test_what_is_worth_less_than_nothing_was_undone() -> None:
    """A recovery may lie nearer to the base than the expert, and merge better."""
    assert checked(**{PLANTED: -0.4})[PLANTED].passed


@pytest.mark.parametrize(
    ("facts", "has_key", "is_exact"),
    [
        ({}, True, True),
        ({"output_gap": 1e-6, "output_gap_bound": 1e-5}, False, True),
        ({"output_gap": 1e-2, "output_gap_bound": 1e-5}, False, False),
        ({"output_gap": None, "output_gap_bound": None}, False, False),
    ],
)
def test_a_release_that_computes_the_same_has_to_be_undone(
    facts: dict[str, Any], has_key: bool, is_exact: bool
) -> None:
    found = checked(lock=0.9, variants=[variant("lock", has_key=has_key, **facts)])
    assert ("exact: lock" in found) == is_exact
    assert all(control.passed for control in found.values()) != is_exact


@pytest.mark.parametrize(("with_key", "passed"), [(None, False), (1.0, False), (1.17, True)])
def test_a_planted_key_is_found_as_far_as_rounding_leaves_it(with_key: float | None, passed: bool) -> None:
    """A recovery at 1.16 of the expert's distance is worth nothing less where the key itself leaves 1.17."""
    variants = [
        variant(IDENTITY, "nearest_orbit", method="nearest_orbit", distance_before=0.01),
        variant("lock", has_key=True, distance_with_key=with_key),
        variant("lock", "nearest_orbit", has_key=True, method="nearest_orbit", distance_after=0.0116),
    ]
    assert checked(lock=0.0, variants=variants)["nearest_orbit on lock (seed 0)"].passed == passed


def test_students_who_learn_nothing_are_no_limit() -> None:
    """No distillation: who only runs the expert is left with what there is without it."""
    merged = protection(0.0).tiers
    for learnt, passed in ((0.15, False), (0.4, False), (0.6, True)):
        running = protection(0.0, "black_box", protected=learnt).tiers
        identity = replace(protection(0.0), tiers={**merged, **running})
        protections = {name: protection(d_star) for name, d_star in FOUND.items()} | {IDENTITY: identity}
        (students,) = (control for control in controls(protections, []) if control.name == "students")
        assert students.value == pytest.approx((learnt - 0.15) / 0.65)
        assert students.passed == passed


def failing(plan: Path, out: Path) -> set[str]:
    return {control.name for control in audit(plan, out=out, workers=1).controls if not control.passed}


@pytest.fixture
def attacked(plan_file: Path, document: dict[str, Any]) -> Path:
    """A plan with what undoes bases, trades and structure, and little else."""
    document["recoveries"] = ["nearest_orbit", "lossless_pruning, nearest_orbit"]
    document["coefficients"] = {"defended": [0.65, 1.0, 1.5], "rider": [1.0], "refinements": 0}
    document["connectivity"] = 0
    plan_file.write_text(yaml.safe_dump(document))
    return plan_file


def changed(plan: Path, document: dict[str, Any], recoveries: list[str]) -> Path:
    document["recoveries"] = recoveries
    plan.write_text(yaml.safe_dump(document))
    return plan


@pytest.mark.slow
def test_an_attacker_who_undoes_everything_passes(attacked: Path, tmp_path: Path) -> None:
    assert failing(attacked, tmp_path / "out") == set()


@pytest.mark.slow
def test_without_canonicalisation_a_control_fails(attacked: Path, document: dict[str, Any], tmp_path: Path) -> None:
    """Rotations and permutations alone do not see what biases, gains and scales have traded."""
    weak = changed(attacked, document, ["kabsch", "neuron_matching", "lossless_pruning"])
    assert failing(weak, tmp_path / "out") >= {PLANTED, PLANTED_STRUCTURE}


@pytest.mark.slow
def test_without_regression_and_pruning_a_control_fails(
    attacked: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    """Changes of basis alone do not see that layers and units were added."""
    weak = changed(attacked, document, ["nearest_orbit"])
    assert PLANTED_STRUCTURE in failing(weak, tmp_path / "out")


def test_a_grid_without_1_fails_a_control(attacked: Path, tmp_path: Path) -> None:
    """A plan that says so is refused; who had it all the same would take a shrunk expert for a protected one."""
    plan = read_plan(attacked)
    weak = replace(plan, coefficients=Grid((0.3,), (1.0,), 0), threat_models=plan.threat_models[:1])
    result = run_audit(weak, out=tmp_path / "out", workers=1)
    assert [control.name for control in result.controls if not control.passed] == [SCALE]
