"""Which trial counts, and what a control is measured by."""

from __future__ import annotations

from typing import Any

import pytest

from unmergeable.evaluation.judge import _bounded, _worst
from unmergeable.evaluation.verdict import attack, verdict


def trial(d_star: float | None, low: float = 0.0, high: float = 0.0, *, is_small: bool = False) -> dict[str, Any]:
    return {"d_star": d_star, "interval": [low, high], "is_denominator_small": is_small}


def test_the_worst_is_the_lowest_that_can_be_judged() -> None:
    """With little to defend D* is a ratio of noise: it must not hide what is known about another trial."""
    noise, known, better = trial(-3.0, is_small=True), trial(0.4), trial(0.7)
    assert _worst([noise, known, better]) is known
    assert _worst([noise, trial(None)]) is noise
    assert _worst([trial(None)]) is None


@pytest.mark.parametrize(
    ("tier", "d_star", "expected"),
    [
        ("T1", -0.2, 0.2),  # without training the estimate itself counts
        ("T2", -0.2, 0.1),  # two points of the twenty that the expert adds are luck
        ("T2", 0.06, 0.0),
        ("T3", 1.0, 0.9),  # however wide the interval is
        ("T2", None, None),
    ],
)
def test_luck_of_training_is_no_failure_of_a_control(tier: str, d_star: float | None, expected: float | None) -> None:
    found = {**trial(d_star, -1.0, 1.0), "unprotected": 0.8, "without_victim": 0.6}
    control = _bounded({"scale": {"tiers": {tier: {"trials": [found]}}}}, "scale", 0.1 + 1e-9, "a control")
    assert control["value"] == (None if expected is None else pytest.approx(expected))
    assert control["passed"] == (expected is not None and expected <= 0.1)


def test_what_an_attacker_with_examples_did() -> None:
    best = {"recovery": None, "merge": "ties", "coefficients": [1.0, 0.5], "uses_victim": True}
    trained = {**best, "recovery": "kabsch", "samples": 16, "learning_rate": 1e-3}
    assert attack(best) == "ties with 1 and 0.5"
    assert attack(trained) == "kabsch, then ties with 1 and 0.5, then training on 16 examples at rate 0.001"
    assert attack({**trained, "uses_victim": False}) == (
        "leave the expert alone, then training on 16 examples at rate 0.001"
    )


def test_no_merge_is_no_score_of_nothing() -> None:
    worst = {**trial(1.0, 1.0, 1.0), "protected": 0.15, "unprotected": 0.8, "without_victim": 0.15, "samples": 16}
    tier = {"worst": worst, "trials": [{**worst, "attacks_tried": 0}]}
    protection = {"utility": {"loss": 0.0}, "tiers": {"T2": tier}}
    assert "labelled examples as well (16 labelled, no merge with it is possible" in verdict("lock", protection)
    tier["trials"] = [{**worst, "attacks_tried": 1}]
    assert "the best merge gets 15 %" in verdict("lock", protection)


def tiers(*found: tuple[float, float]) -> dict[str, Any]:
    """A protection whose D*, and lower end of its interval, are these for attackers of rising means."""
    scores = {"unprotected": 0.8, "without_victim": 0.2}
    entries = {}
    for number, (d_star, low) in enumerate(found):
        worst = {**trial(d_star, low, 1.0), **scores, "protected": 0.1 * (number + 1), "attacks_tried": 3}
        entries[f"T{number}"] = {"worst": worst, "trials": [worst]}
    return {"utility": {"loss": 0.0}, "tiers": entries}


@pytest.mark.parametrize(
    ("found", "said", "unsaid"),
    [
        (((0.9, 0.85), (0.0, 0.0), (0.0, -0.1)), ("It stops T0", ", but it does not stop T1", "gets 20 %"), "T2"),
        (((0.9, 0.85), (0.9, 0.85), (0.9, 0.85)), ("It stops T2", "gets 30 %"), "T0"),
        (((0.0, 0.0), (0.0, 0.0)), ("It does not stop T0", "gets 10 %"), "T1"),
        (((1.0, 0.1), (0.1, 0.0)), ("It is not shown to stop T0", ", and it does not stop T1", "gets 20 %"), "T2"),
        (
            ((0.9, 0.85), (0.6, 0.3), (0.1, 0.0)),
            ("stops T0", ", but it hinders T1", ", but it does not stop T2"),
            " and ",
        ),
    ],
)
def test_a_verdict_names_the_weakest_attacker_who_gets_through(
    found: tuple[tuple[float, float], ...], said: tuple[str, ...], unsaid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmergeable.evaluation.verdict.TIERS", {f"T{number}": f"T{number}" for number in range(4)})
    sentence = verdict("lock", tiers(*found)).partition("against 80 %")[0]
    assert all(text in sentence for text in said), sentence
    assert unsaid not in sentence


def test_a_verdict_on_little_to_defend_names_no_scores() -> None:
    protection = tiers((0.5, 0.3))
    protection["tiers"]["T0"]["worst"]["is_denominator_small"] = True
    sentence = verdict("lock", protection)
    assert "Nothing can be said about ordinary merging, for the expert adds too little" in sentence
    assert "gets" not in sentence
