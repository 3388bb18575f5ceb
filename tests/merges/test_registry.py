"""The registry holds every method, under its own name, with settings that can be written down."""

import json
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

import unmergeable.merges
from unmergeable.merges import MERGES, Merge

MACHINERY = {
    "__init__",
    "blocks",
    "bracket",
    "election",
    "engine",
    "learning",
    "magnitudes",
    "masks",
    "base",
    "models",
    "spectral",
    "task_vectors",
    "thinning",
    "variation",
}


def test_every_method_module_is_registered() -> None:
    (folder,) = unmergeable.merges.__path__
    modules = {path.stem for path in Path(folder).glob("*.py")}
    assert modules - MACHINERY == set(MERGES)
    assert modules >= MACHINERY  # control: the list above is not stale


@pytest.mark.parametrize("name", MERGES)
def test_a_method_is_its_file_and_a_frozen_dataclass(name: str) -> None:
    method = MERGES[name]
    assert method.name == name
    assert method.__module__ == f"unmergeable.merges.{name}"
    assert is_dataclass(method)
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert import_module(method.__module__).__doc__


@pytest.mark.parametrize("name", MERGES)
def test_default_settings_are_valid_and_can_be_recorded(name: str) -> None:
    method: Merge = MERGES[name]()
    method.validate()
    assert set(json.loads(json.dumps(asdict(method)))) == {field.name for field in fields(method)}
