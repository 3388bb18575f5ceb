"""The committed summary says what the shipped maps cover: counts, and a reason for every type that has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmergeable.architecture.derived import DerivedMap, known_map
from unmergeable.derivation.build import TASKS, registered
from unmergeable.derivation.summary import counts, level, page, read_reasons, short

PAGE = Path(__file__).parents[2] / "docs" / "model-types.md"


@pytest.mark.parametrize("task", TASKS)
def test_every_type_has_a_whole_map_or_a_reason(task: str) -> None:
    lacking = {kind for kind in registered(task) if level(kind) in {"none", "part"}}
    assert set(read_reasons().get(task, {})) == lacking
    assert all(read_reasons().get(task, {}).values())


def test_counts_add_up() -> None:
    for task in TASKS:
        found = counts(task)
        assert found.pop("registered") == len(registered(task)) == sum(found.values())


def test_the_page_is_what_the_maps_say() -> None:
    assert PAGE.read_text("utf-8") == page(read_reasons())


def test_a_type_without_its_map_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with one map fewer, the page and the list of reasons are no longer right."""
    assert level("granite") == "whole"
    monkeypatch.setattr("unmergeable.derivation.summary.shipped", lambda: ("bart",))
    assert level("granite") == "none"
    assert PAGE.read_text("utf-8") != page(read_reasons())


def test_a_map_of_one_part_says_what_it_lacks() -> None:
    derived = known_map("bart")
    assert derived is not None
    document = derived.to_json()
    assert DerivedMap.from_json(document).attentions
    lacking = {**document, "attentions": [], "reasons": {"attention in model.layers.{}": "a norm lies between"}}
    assert short(lacking) == "no attention: a norm lies between"
    assert short({"failure": "bart: a small network cannot be built (ValueError: no)."}).startswith("a small network")
