"""The committed figures of the dial of ``collapse``: the page shows them, and they say what the page says of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from benchmarks.collapse_dial import KEPT, RESULT, RIDERS, SETTINGS, table

from unmergeable.protections import PROTECTIONS
from unmergeable.settings import configure

PAGE = Path(__file__).parents[2] / "docs" / "collapse.md"
ROWS = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]


def test_the_page_shows_the_committed_result() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert table(ROWS) in text, "put the rows of benchmarks.collapse_dial.table on the page"
    better = copy.deepcopy(ROWS)
    better["the defaults"]["elsewhere"]["mnist"] += 1
    assert table(better) not in text


def test_settings_are_those_that_can_be_set() -> None:
    assert set(ROWS) == {"the base", "the expert", *SETTINGS}
    for name, settings in SETTINGS.items():
        assert ROWS[name]["settings"] == settings
        configure(PROTECTIONS["collapse"], settings)


def test_the_best_merge_is_the_best_of_those_that_serve_the_rider() -> None:
    for name, row in ROWS.items():
        for task in RIDERS:
            found = row["free_riders"][task]
            useful = [merge["owner"] for merge in found["merges"] if merge["rider"] >= KEPT * found["alone"]]
            assert found["best"] == max(useful, default=None), (name, task)
            assert ROWS["the expert"]["free_riders"][task]["best"] is not None, "control: unprotected merges serve"


def test_less_of_the_trap_keeps_more_elsewhere() -> None:
    """What the page advises, and that the expert has still more."""
    gentler = [name for name in SETTINGS if name != "the defaults"]
    for task in RIDERS:
        for name in gentler:
            assert (
                ROWS["the defaults"]["elsewhere"][task]
                < ROWS[name]["elsewhere"][task]
                < ROWS["the expert"]["elsewhere"][task]
            )
