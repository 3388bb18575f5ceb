"""A whole audit of a toy by attackers who merge nothing of the release: who runs it, and who trains it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.evaluation.audits import audit
from unmergeable.evaluation.recompute import recomputed
from unmergeable.evaluation.results import AuditResult, Trial
from unmergeable.evaluation.threat_models import ThreatModel

DISTIL = {"method": "distil", "settings": {"steps": 60, "learning_rate": 0.003, "layers": 1}}
TRAINING = {
    "samples": [20],
    "own_examples": 200,
    "settings": {"steps": 60, "learning_rates": "3e-4,1e-3,3e-3", "batch_size": 32},
}


@pytest.fixture(scope="module")
def result(workshop: Path, whole_plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> AuditResult:
    tasks = [{**task, "train": f"{task['name'][:-5]}-train.npz"} for task in whole_plan["tasks"]]
    plan = {
        **whole_plan,
        "tasks": tasks,
        "protect": {"expert": "mine", "methods": ["mergelock"]},
        "recoveries": ["nearest_orbit", DISTIL],
        "threat_models": ["off_the_shelf", "white_box", "black_box", "retrain"],
        "retrain": TRAINING,
        "coefficients": {"defended": [0.65, 1.0], "rider": [0.75, 1.0], "refinements": 0},
        "connectivity": 0,
    }
    path = workshop / "access.yaml"
    path.write_text(yaml.safe_dump(plan))
    return audit(path, out=tmp_path_factory.mktemp("access") / "out", workers=1)


def worst(result: AuditResult, model: ThreatModel) -> Trial:
    found = result.protections["mergelock"].tiers[model].worst
    assert found is not None
    return found


def test_who_only_runs_it_is_not_stopped_by_a_key(result: AuditResult) -> None:
    """The student learns what the release answers, on inputs of the free-rider's own task, and merges."""
    merging, running = (worst(result, model) for model in (ThreatModel.OFF_THE_SHELF, ThreatModel.BLACK_BOX))
    best = running.best["protected"]
    assert (best.recovery, best.steps, best.examples) == ("distil", 60, 200)
    assert best.cpu_seconds > 0
    assert running.protected > running.without_victim
    assert running.without_victim == merging.without_victim
    students = [model for model in result.models if model.recovery == "distil"]
    assert {(student.protection, student.rider) for student in students} == {
        ("identity", "theirs"),
        ("mergelock", "theirs"),
    }
    assert all(model.rider is None for model in result.models if model.recovery != "distil")


def test_the_excess_is_the_difference_of_the_two_best(result: AuditResult) -> None:
    informed, running = (worst(result, model) for model in (ThreatModel.WHITE_BOX, ThreatModel.BLACK_BOX))
    (excess,) = result.protections["mergelock"].excess or ()
    assert excess.weights == informed.protected
    assert excess.black_box == running.protected
    assert excess.value == pytest.approx(informed.protected - running.protected)
    assert excess.interval[0] <= excess.value <= excess.interval[1]


def test_a_release_is_better_to_train_on_than_what_is_there_without_it(result: AuditResult) -> None:
    """With the same twenty labelled examples, steps and rate from the release, the free-rider's model and the base."""
    training = worst(result, ThreatModel.RETRAIN)
    release, without = training.best["protected"], training.best["without_victim"]
    assert training.protected > training.without_victim
    assert (release.merge, release.recovery, release.samples, release.uses_victim) == (None, None, 20, True)
    assert (release.steps, release.examples) == (without.steps, without.examples) == (60, 220)
    starts = {
        cell.attack.start for cell in result.cells or () if cell.tier is ThreatModel.RETRAIN and cell.protection is None
    }
    assert starts == {"base", "theirs"}


def test_controls_of_merging_are_judged_on_merging_alone(result: AuditResult) -> None:
    tiers = {name: set(protection.tiers) for name, protection in result.protections.items()}
    assert tiers["identity"] == tiers["mergelock"] == set(ThreatModel) - {ThreatModel.FEW_SHOT, ThreatModel.UNLABELLED}
    assert tiers["scale"] == tiers["nothing"] == {ThreatModel.OFF_THE_SHELF, ThreatModel.WHITE_BOX}


def test_anybody_can_compute_it_again(result: AuditResult) -> None:
    again = AuditResult.from_json(result.to_json())
    assert again == result
    for found in recomputed(again):
        if found.trial.d_star is not None:
            assert found.d_star == pytest.approx(found.trial.d_star)
    assert {found.model for found in recomputed(again)} >= {ThreatModel.BLACK_BOX, ThreatModel.RETRAIN}
