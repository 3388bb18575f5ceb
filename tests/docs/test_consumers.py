"""The committed measurements of what people do with a release: pages show them, and defaults hold what they promise."""

from __future__ import annotations

import json

import pytest
from benchmarks.consumers import DEFAULTS, PAGE, RESULT, WITHIN, with_tables

RESULTS = json.loads(RESULT.read_text(encoding="utf-8"))
FORMATS = ("int8", "int4, groups of 64", "Q8_0", "Q4_K_M")


def test_the_page_shows_the_committed_result() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text, RESULTS) == text, "run python -m benchmarks.consumers --tables"
    expert = RESULTS["quantised"]["expert"]
    better = {**RESULTS, "quantised": {**RESULTS["quantised"], "expert": {**expert, "float32": expert["float32"] - 1}}}
    assert with_tables(text, better) != text


@pytest.mark.parametrize("model", ["quantised", "quantised_encoder"])
@pytest.mark.parametrize("form", FORMATS)
def test_defaults_survive_quantisation(model: str, form: str) -> None:
    quantised = RESULTS[model]
    for method in DEFAULTS:
        assert quantised[method][form] <= (1 + WITHIN) * quantised["expert"][form], method


def test_what_is_drawn_on_request_does_not_survive_on_the_encoder() -> None:
    """The control: there is something to lose."""
    quantised = RESULTS["quantised_encoder"]
    form = "int4, groups of 64"
    assert quantised["params, free"][form] > 1.2 * quantised["expert"][form]
    assert quantised["params, free"]["predicted"] > 1.1


@pytest.mark.parametrize("form", FORMATS)
def test_defaults_are_predicted_to_survive_and_what_is_drawn_on_request_does_not(form: str) -> None:
    quantised = RESULTS["quantised"]
    for method in DEFAULTS:
        assert quantised[method]["predicted"] == pytest.approx(1, abs=0.02)
    if form == "int4, groups of 64":
        free = [name for name in quantised if name.endswith("free")]
        assert free
        for name in free:
            assert quantised[name][form] > 1.5 * quantised["expert"][form]
            assert quantised[name]["predicted"] > 1.1, "and protect says so"


def test_default_gauge_still_spoils_a_merge() -> None:
    averaged = {name: cells["averaged"] for name, cells in RESULTS["quantised"].items()}
    assert averaged["expert"] < 1.1 * RESULTS["quantised"]["expert"]["float32"], "control: merging works unprotected"
    assert averaged["gauge"] > 100 * averaged["expert"]


def rounding(program: str) -> float:
    """Twice a step of the grid that a program rounds weights to, as a share of their range: a grid that is not
    symmetric rounds a weight and its negative apart, in one matrix after another."""
    steps = {"int4": 15, "int8": 255, "float8": 16}
    return next((2 / count for kind, count in steps.items() if kind in program), 1e-3)


def test_every_program_does_the_same_with_a_release() -> None:
    for program, cells in RESULTS["consumers"].items():
        for name in DEFAULTS:
            cell = cells[name]
            assert all(value for key, value in cell.items() if key.startswith("same")), (program, name)
            if "loss" in cell:
                # A head learns from hidden states, which are in another basis: as well as before, or better.
                least = 0.0 if "head" in program else 0.95 * cells["expert"]["loss"]
                assert least <= cell["loss"] <= 1.05 * cells["expert"]["loss"], (program, name)
            if "gap" in cell and "hidden states" not in program and "bfloat16" not in program:
                assert cell["gap"] < rounding(program), (program, name)
    moved = RESULTS["consumers"].get("hidden states as embeddings")
    assert moved is None or moved["gauge"]["gap"] > 0.1, "as the page says"
