"""Kinds of tasks: every one is registered under the name of its file, can be configured, and says what it is."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

import unmergeable.tasks
from unmergeable.errors import UsageError
from unmergeable.settings import configure
from unmergeable.tasks import TASKS, LabelledData

FOLDER = Path(unmergeable.tasks.__file__).parent
NEEDED = {"judge": {"command": ["judge"]}, "text_to_image": {"pipeline": "a", "measured_by": "b"}}
NO_KINDS = {
    "__init__", "answers", "clip_head", "credits", "heads", "labelled", "likelihood", "prompts", "task_kind",
}  # fmt: skip


def test_every_file_is_a_kind_or_known_to_be_none() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(TASKS) | NO_KINDS
    assert LabelledData.__module__.rpartition(".")[2] in NO_KINDS


@pytest.mark.parametrize("name", TASKS)
def test_a_kind(name: str) -> None:
    kind = TASKS[name]
    assert kind.__module__ == importlib.import_module(f"unmergeable.tasks.{name}").__name__
    settings = configure(kind, NEEDED.get(name, {}))
    assert hash(settings) == hash(configure(kind, NEEDED.get(name, {}))), "workers keep tasks by their settings"
    assert set(kind.paths) <= {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    if name != "lm_eval":  # asks an optional package for its version
        json.dumps(settings.facts())
    with pytest.raises(UsageError, match=f"{name} has no setting 'colour'"):
        configure(kind, {"colour": "red"})
