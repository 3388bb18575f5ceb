"""``docs/merging.md`` has every method, and the defaults it states are the defaults."""

import importlib.util
import json
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType

import pytest

from unmergeable.merges import MERGES
from unmergeable.merges.mergekit.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "merging.md").read_text()
ROWS = {match[1]: match[0] for match in re.finditer(r"^\| \[?`(\w+)`.*$", PAGE.partition("## Where")[0], re.MULTILINE)}


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == set(MERGES)


@pytest.mark.parametrize("name", MERGES)
def test_stated_defaults_are_the_defaults(name: str) -> None:
    stated = re.findall(r"`(\w+)` = ([\d.]+)", ROWS[name].split("|")[-2])
    defaults = {field.name: field.default for field in fields(MERGES[name])}
    assert {setting: float(value) for setting, value in stated} == {setting: defaults[setting] for setting, _ in stated}
    numbers = {n for n, value in defaults.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    assert {setting for setting, _ in stated} == numbers - {"smallest_norms"}
    assert MISSING not in defaults.values()


@pytest.mark.parametrize("name", ["merge_speed", "merge_parity"])
def test_tables_are_those_of_the_committed_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert benchmark(name, monkeypatch).table(results) in PAGE


def test_the_speed_of_every_method_that_mergekit_has_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """But of one that copies, and one that is another with other numbers."""
    assert set(benchmark("merge_speed", monkeypatch).CONFIGS) == set(METHODS) - {"passthrough", "ramplus_tl"}


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_mergekits_methods_are_listed() -> None:
    listed = PAGE.partition("`merge_method`, one of")[2].partition(";")[0]
    assert re.findall(r"`(\w+)`", listed) == list(METHODS)
