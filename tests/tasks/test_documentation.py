"""docs/tasks.md names every kind of task, and its examples can be used as they stand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from unmergeable.settings import configure
from unmergeable.tasks import TASKS

TEXT = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_every_kind_is_there() -> None:
    _, *named = re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", TEXT, re.MULTILINE)
    assert named == list(TASKS)
    assert re.findall(r"^\*\*(\w+)\.\*\*", TEXT, re.MULTILINE) == list(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_every_setting_is_there(name: str) -> None:
    for field in dataclasses.fields(TASKS[name]):  # type: ignore[arg-type]
        assert f"`{field.name}`" in TEXT or f"`{field.name}:" in TEXT or f"{field.name}: " in TEXT, field.name


def test_the_plan_can_be_read() -> None:
    (written,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    entries = yaml.safe_load(written)["tasks"]
    assert [entry["kind"] for entry in entries] == ["multiple_choice", "generation"]
    for entry in entries:
        configure(TASKS[entry["kind"]], entry["settings"])
