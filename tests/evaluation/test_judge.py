"""Which trial counts, and what a control is measured by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evaluation.documents import WORST
from unmergeable.evaluation.controls import bounded
from unmergeable.evaluation.judge import worst_trial
from unmergeable.evaluation.report.verdict import attack, judgement, verdict
from unmergeable.evaluation.results import AttackRecord, ProtectionResult, Trial
from unmergeable.evaluation.threat_models import ThreatModel


def trial(d_star: float | None, low: float = 0.0, high: float = 0.0, *, is_small: bool = False) -> dict[str, Any]:
    scores = {**WORST, "rider": "theirs", "seed": 0, "attacks_tried": 3}
    return {**scores, "d_star": d_star, "interval": [low, high], "is_denominator_small": is_small}


def protection(tiers: dict[str, Any]) -> ProtectionResult:
    """With trials by the code of a threat model."""
    utility = {"expert": 0.8, "protected": 0.8, "loss": 0.0}
    document = {"is_control": False, "utility": utility, "tiers": tiers, "matrix": [], "fronts": []}
    return ProtectionResult.from_json(document)


def test_the_worst_is_the_lowest_that_can_be_judged() -> None:
    """With little to defend D* is a ratio of noise: it must not hide what is known about another trial."""
    noise, known, better, nothing = (
        Trial.from_json(found) for found in (trial(-3.0, is_small=True), trial(0.4), trial(0.7), trial(None))
    )
    assert worst_trial([noise, known, better]) is known
    assert worst_trial([noise, nothing]) is noise
    assert worst_trial([nothing]) is None


@pytest.mark.parametrize(
    ("tier", "d_star", "expected"),
    [
        ("T1", -0.2, 0.2),  # without training the estimate itself counts
        ("T2", -0.2, 0.1),  # two points of the twenty that the expert adds are luck
        ("T2", 0.06, 0.0),
        ("T3", 1.0, 0.9),
        ("T2", None, None),
    ],
)
def test_luck_of_training_is_no_failure_of_a_control(tier: str, d_star: float | None, expected: float | None) -> None:
    ends = (d_star, d_star) if d_star is not None else (0.0, 0.0)
    found = {**trial(d_star, *ends), "unprotected": 0.8, "without_victim": 0.6}
    scale = protection({tier: {"worst": None, "trials": [found]}})
    control = bounded({"scale": scale}, "scale", 0.1 + 1e-9, "a control")
    assert control.value == (None if expected is None else pytest.approx(expected))
    assert control.passed == (expected is not None and expected <= 0.1)


def test_what_an_attacker_with_examples_did() -> None:
    best = AttackRecord(recovery=None, merge="ties", coefficients=(1.0, 0.5), uses_victim=True, cpu_seconds=1.0)
    trained = replace(best, recovery="kabsch", samples=16, learning_rate=1e-3)
    assert attack(best) == "ties with 1 and 0.5"
    assert attack(trained) == "kabsch, then ties with 1 and 0.5, then training on 16 examples at rate 0.001"
    assert attack(replace(trained, uses_victim=False)) == (
        "leave the expert alone, then training on 16 examples at rate 0.001"
    )


def test_no_merge_is_no_score_of_nothing() -> None:
    worst = {**trial(1.0, 1.0, 1.0), "protected": 0.15, "unprotected": 0.8, "without_victim": 0.15, "samples": 16}
    tier = {"worst": worst, "trials": [{**worst, "attacks_tried": 0}]}
    found = protection({"T2": tier})
    assert {judgement(verdicts) for verdicts in found.tiers.values()} == {"cannot be judged"}
    assert "no merge with it is possible" in verdict("lock", found)
    tier["trials"] = [{**worst, "attacks_tried": 1}]
    assert "the best merge gets 15 %" in verdict("lock", protection({"T2": tier}))


def judged(*found: tuple[float, float], **worst: Any) -> ProtectionResult:
    """A protection whose D*, and lower end of its interval, are these for attackers of rising means."""
    scores = {"unprotected": 0.8, "without_victim": 0.2}
    entries = {}
    for number, (d_star, low) in enumerate(found):
        lowest = {**trial(d_star, low, 1.0), **scores, "protected": 0.1 * (number + 1), **worst}
        entries[f"T{number}"] = {"worst": lowest, "trials": [lowest]}
    return protection(entries)


@pytest.mark.parametrize(
    ("found", "said", "unsaid"),
    [
        (((0.9, 0.85), (0.0, 0.0), (0.0, -0.1)), ("It stops [T0]", ", but it does not stop [T1]", "gets 20 %"), "[T2]"),
        (((0.9, 0.85), (0.9, 0.85), (0.9, 0.85)), ("It stops [T2]", "gets 30 %"), "[T0]"),
        (((0.0, 0.0), (0.0, 0.0)), ("It does not stop [T0]", "gets 10 %"), "[T1]"),
        (
            ((1.0, 0.1), (0.1, 0.0)),
            ("It is not shown to stop [T0]", ", and it does not stop [T1]", "gets 20 %"),
            "[T2]",
        ),
        (
            ((0.9, 0.85), (0.6, 0.3), (0.1, 0.0)),
            ("stops [T0]", ", but it hinders [T1]", ", but it does not stop [T2]"),
            " and ",
        ),
    ],
)
def test_a_verdict_names_the_weakest_attacker_who_gets_through(
    found: tuple[tuple[float, float], ...], said: tuple[str, ...], unsaid: str
) -> None:
    sentence = verdict("lock", judged(*found)).partition("against 80 %")[0]
    for model in ThreatModel:
        sentence = sentence.replace(f"{model.phrase} ({model}", f"[{model.code}] (")
    assert all(text in sentence for text in said), sentence
    assert unsaid not in sentence


def test_a_verdict_on_little_to_defend_names_no_scores() -> None:
    sentence = verdict("lock", judged((0.5, 0.3), is_denominator_small=True))
    assert "Inconclusive against ordinary merging (off_the_shelf): the unprotected expert improves" in sentence
    assert "less than 5 points" in sentence
    assert "gets" not in sentence
