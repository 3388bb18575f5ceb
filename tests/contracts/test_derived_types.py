"""The committed figures of the owner's job on derived types: every type measured keeps the whole contract."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from benchmarks.derived_types import EXCEPTIONS, KINDS, RELEASES, RESULT, failings

ROWS = json.loads(RESULT.read_text("utf-8"))["types"]


@pytest.mark.parametrize("kind", ROWS)
def test_every_measured_type_keeps_the_contract(kind: str) -> None:
    assert kind in KINDS
    assert [text.rpartition(" ")[0] for text in failings(ROWS[kind])] == list(EXCEPTIONS.get(kind, ()))


@pytest.mark.parametrize(
    ("figure", "wrong"),
    [
        ("error", 1e-3),
        ("error_bfloat16", 0.5),
        ("moved", 0.1),
        ("merged", 0.05),
        ("restored", 1e-3),
        ("recovered", 1.5),
        ("recovered_control", 1.0),
    ],
)
def test_a_figure_out_of_bounds_is_said(figure: str, wrong: float) -> None:
    row = copy.deepcopy(ROWS["granite"])
    row[next(iter(RELEASES))][figure] = wrong
    assert len(failings(row)) == 1


def test_the_page_counts_what_was_measured() -> None:
    page = (Path(__file__).parents[2] / "docs" / "model-types.md").read_text("utf-8")
    said = " ".join(page.split())
    assert len(ROWS) == 78
    assert "small networks of seventy-eight of them" in said
    assert f"and {sum(not failings(row) for row in ROWS.values())} keep every promise" in said


def test_a_type_that_failed_is_said() -> None:
    assert failings({"failure": "RuntimeError: no"}) == ["RuntimeError: no"]
