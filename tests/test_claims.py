"""What is said of a protection is what the committed audits found, to the digit; a flattering sentence is noticed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.claims import (
    CLAIMS,
    RESULTS,
    STUDIES,
    TIERS,
    claims_document,
    d_star,
    defaults_of_protections,
    protections_of,
    ranking,
)

from unmergeable import claims
from unmergeable.claims import DStar, Measurement, limits, measured, measurements

DEFAULTS = [row for row in measurements() if not row.settings]


def named(row: Measurement) -> str:
    return f"{row.study.name} {row.method} {dict(row.settings)}"


CALLED = {"condition": ", condition 1000", "parts": ", attention", "quantisation": ""}
"""What the audits call a method with one of these settings."""


def entry_of(row: Measurement) -> Mapping[str, Any]:
    """What the audit says of the protection, looked up by its name there and not by the code under test."""
    audit = json.loads((RESULTS / f"{row.study.name}.json").read_text(encoding="utf-8"))
    name = row.method + "".join(CALLED[setting] for setting in row.settings)
    found: Mapping[str, Any] = audit["protections"].get(name) or audit["protections"][f"{name}, combined"]
    return found


def attacker_of(row: Measurement) -> str | None:
    """By name; None of those that listed their own attacks."""
    plan = json.loads((RESULTS / f"{row.study.name}.json").read_text(encoding="utf-8"))["plan"]
    found: str | None = plan.get("attacker")
    return found


def kept(worst: Mapping[str, Any]) -> float:
    """Share of the skill, among all that an attacker can gain by the expert, that the protection keeps from it."""
    gain: float = worst["unprotected"] - worst["without_victim"]
    return (worst["unprotected"] - worst["protected"]) / gain


def is_supported(row: Measurement) -> bool:
    """Whether the audit has these figures: recomputed from the scores, and not from the D* that it states."""
    return all(
        found.value == pytest.approx(kept(entry_of(row)["tiers"][tier]["worst"]), abs=1e-5)
        and [found.low, found.high] == pytest.approx(entry_of(row)["tiers"][tier]["worst"]["interval"], abs=1e-5)
        for tier, threat_model in TIERS.items()
        if (found := row.d_star.get(threat_model)) is not None
    )


def test_the_file_is_what_the_command_makes() -> None:
    assert json.loads(CLAIMS.read_text(encoding="utf-8")) == claims_document()


@pytest.mark.parametrize("row", measurements(), ids=named)
def test_every_figure_is_in_an_audit(row: Measurement) -> None:
    assert set(row.d_star) == {TIERS[tier] for tier in entry_of(row)["tiers"]}
    assert is_supported(row)
    assert row.utility_loss == pytest.approx(100 * entry_of(row)["utility"]["loss"], abs=0.051)


def test_a_flattering_figure_would_be_noticed() -> None:
    (row,) = measured("mergelock", "language_model")
    flattered = replace(row, d_star={**row.d_star, "off_the_shelf": DStar(1.0, 1.0, 1.0)})
    assert is_supported(row)
    assert not is_supported(flattered)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_leaderboard_has_the_figures_of_the_audits_own_tables(study: claims.Study) -> None:
    published = (RESULTS / f"{study.name}.md").read_text(encoding="utf-8")
    audits = sorted(re.findall(r"(-?\d\.\d\d), 95 % interval (-?\d\.\d\d) to (-?\d\.\d\d)", published))
    ours = re.findall(r"(-?\d\.\d\d) \[(-?\d\.\d\d), (-?\d\.\d\d)\]", ranking(study))
    assert sorted(ours) == audits


@pytest.mark.parametrize("row", measurements(), ids=named)
def test_a_protection_is_said_to_stop_only_what_it_stops(row: Measurement) -> None:
    sentence = limits(row.method, row.study.kind, row.settings)
    tiers = entry_of(row)["tiers"]
    spoken = [tier for tier in tiers if claims.THREAT_MODELS[TIERS[tier]] in sentence]
    assert spoken[0] == "T0"
    for tier in spoken:
        low = tiers[tier]["worst"]["interval"][0]
        clause = next(text for text in sentence.split(". ") if claims.THREAT_MODELS[TIERS[tier]] in text)
        assert (" stops " in clause) == (low >= 0.8 and (tier == "T0" or attacker_of(row) != "quick-1"))
        assert ("does not stop" in clause) == (max(low, kept(tiers[tier]["worst"])) < 0.2)
    # Who is not named can do at least what somebody can whom nothing stops.
    assert len(spoken) == len(tiers) or "does not stop" in sentence


def test_merges_of_a_language_model_under_mergelock_are_not_stopped() -> None:
    """The sentence that the project once said in eleven places, and that its own audit refutes."""
    assert limits("mergelock", "language_model") == (
        "mergelock does not stop off-the-shelf merging on SmolLM2-135M (D* -0.13). "
        "It does not stop an attacker who holds the base and knows the method on SmolLM2-135M (D* 0.00)."
    )
    assert "stops off-the-shelf merging on SmolLM2-135M" in limits("gauge")
    assert "stops off-the-shelf merging on SmolLM2-135M" not in limits("mergelock")


def test_models_that_were_not_audited_get_every_sentence() -> None:
    assert limits("gauge", "protein") == limits("gauge")


def test_settings_choose_what_was_audited_with_them() -> None:
    assert "T5 (2M) (D* 0.30" in limits("mergebarrier", settings={"parts": "attention"})
    assert {row.settings["condition"] for row in measured("mergelock", settings={"condition": 1000})} == {1000}
    assert not any(row.settings for row in measured("mergelock"))
    assert limits("mergeguard", settings={"steps": 7}) == limits("mergeguard")


def test_settings_that_no_audit_had_are_named() -> None:
    sentence = limits("gauge", settings={"quantisation_friendly": True})
    assert sentence == f"{limits('gauge')} None of these audits had quantisation_friendly=True."


def test_a_protection_of_another_package_is_not_spoken_for() -> None:
    assert limits("mine") == "No audit here says what mine stops; `unmergeable audit` measures it."


def test_every_protection_was_audited_or_is_said_not_to_be() -> None:
    not_audited = set(defaults_of_protections()) - {row.method for row in DEFAULTS}
    assert not_audited == {"anchor_repulsive", "collapse", "trap2"}
    assert "not audited yet" in (RESULTS.parents[1] / "docs" / "protections.md").read_text(encoding="utf-8")


def test_an_audit_whose_controls_failed_supports_nothing() -> None:
    audit = json.loads((RESULTS / "vision_audit.json").read_text(encoding="utf-8"))
    assert protections_of(audit)
    with pytest.raises(ValueError, match="control"):
        protections_of({**audit, "passed": False})


@pytest.mark.parametrize(
    ("found", "judgement"),
    [
        (DStar(1.0, 0.8, 1.0), "stops"),
        (DStar(1.0, 0.79, 1.0), "hinders"),
        (DStar(1.0, 0.19, 1.0), "is not shown to stop"),
        (DStar(0.19, -0.5, 1.0), "does not stop"),
        (DStar(None, None, None), "cannot be judged against"),
    ],
)
def test_the_lower_end_of_the_interval_decides(found: DStar, judgement: str) -> None:
    assert found.judgement == judgement


def test_claims_need_no_torch() -> None:
    program = "import sys; from unmergeable.claims import limits; limits('gauge'); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "False"


def test_the_file_is_part_of_the_package() -> None:
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert CLAIMS.parent.name == "unmergeable"
    assert '"claims.json"' in declared


def test_what_is_said_of_all_is_what_each_audit_says() -> None:
    """A protection is named for an attacker where some audit's own interval lies above 0.8, and nowhere else. An audit
    by the attacker for a first look says of nobody who knows the method that he is stopped."""
    stopping: dict[str, set[str]] = {}
    for row in DEFAULTS:
        for tier, tried in entry_of(row)["tiers"].items():
            low = tried["worst"]["interval"][0]
            is_stopped = low >= 0.8 and (tier == "T0" or attacker_of(row) != "quick-1")
            stopping.setdefault(TIERS[tier], set()).update({row.method} if is_stopped else set())
    sentences = claims.overall().removesuffix(".").split(". ")
    assert len(sentences) == len(stopping)
    for sentence, (threat_model, methods) in zip(sentences, stopping.items(), strict=True):
        whom = claims.THREAT_MODELS[threat_model]
        assert whom.lower() in sentence.lower()
        assert sentence.startswith("No audited protection stops") == (not methods)
        assert {word.strip(",") for word in sentence.split()} & {row.method for row in DEFAULTS} == methods


def test_who_was_not_recognised_stops_nobody() -> None:
    assert DStar(1.0, 1.0, 1.0).judgement == "stops"
    assert DStar(1.0, 1.0, 1.0, is_recognised=False).judgement == "is not shown to stop"
    found = {"d_star": 1.0, "interval": [1.0, 1.0], "is_denominator_small": False}
    assert d_star({**found, "flags": ["not_recognised"]}) == [1.0, 1.0, 1.0, False]
    assert d_star(found) == [1.0, 1.0, 1.0]
    assert d_star(found, is_first_look=True) == [1.0, 1.0, 1.0, False]
    assert d_star({**found, "flags": ["uncertain_denominator"]}) == [None, None, None]
