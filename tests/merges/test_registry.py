"""The registry holds every method, under its own name, with settings that can be written down; strangers' too."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmergeable.merges
from merges.small_models import make_models, write_checkpoint
from unmergeable.merges import MERGES, Merge, merge_state_dicts

MACHINERY = {
    "__init__",
    "adapters",
    "adaptation",
    "blocks",
    "bracket",
    "comparison",
    "differences",
    "election",
    "engine",
    "learning",
    "magnitudes",
    "masks",
    "members",
    "base",
    "models",
    "modules",
    "networks",
    "plan",
    "rows",
    "spectral",
    "sphere",
    "stacks",
    "sweeps",
    "task_vectors",
    "thinning",
    "variation",
    "vocabularies",
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


MEDIAN = '''"""``median``: of every weight the median of the experts."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from unmergeable.merges import Merge, Requirements, merge_blocks


@dataclass(frozen=True)
class Median(Merge):
    name: ClassVar[str] = "median"

    factor: float = 1.0

    def requirements(self):
        return Requirements()

    def prepare(self, inputs, terms):
        def median(blocks, spare):
            return torch.stack(blocks).median(dim=0).values * self.factor

        return lambda name, operands, scratch: merge_blocks(name, operands, median, scratch)
'''
"""A merge of another package, as its author would write it."""


def test_a_merge_of_another_package_is_used_like_our_own(tmp_path: Path) -> None:
    """Listed, run on files by its name, and run in memory: installing the package is all there is to do."""
    packages = tmp_path / "site-packages"
    (packages / "their_merges-1.0.dist-info").mkdir(parents=True)
    (packages / "their_merges.py").write_text(MEDIAN)
    (packages / "their_merges-1.0.dist-info" / "METADATA").write_text("Name: their-merges\nVersion: 1.0\n")
    (packages / "their_merges-1.0.dist-info" / "entry_points.txt").write_text(
        "[unmergeable.merges]\nmedian = their_merges:Median\n"
    )
    _, experts = make_models(3)
    for number, expert in enumerate(experts):
        write_checkpoint(tmp_path / str(number), expert)
    program = """
import unmergeable.merges.ties
import json, sys
from safetensors.torch import load_file, save_file
from unmergeable import ops
from unmergeable.cli import main
from unmergeable.merges import merge_method, merge_state_dicts

assert callable(unmergeable.merges.ties)  # although the module was the first to be imported
(listed,) = [entry for entry in ops.methods().merges if entry.name == "median"]
print(json.dumps(listed.to_json()))
experts = [load_file(f"{number}/model.safetensors") for number in range(3)]
merged = merge_state_dicts(None, experts, method=merge_method("median", factor=2))
save_file(merged, "memory.safetensors")
experts = [word for number in range(3) for word in ("--expert", str(number))]
sys.argv = ["unmergeable", "merge", "--method", "median", "--set", "factor=2", *experts, "--out", "out"]
main()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout.splitlines()[0])
    assert listed["summary"] == "of every weight the median of the experts"
    assert (listed["needs"], [setting["name"] for setting in listed["settings"]]) == ([], ["factor"])
    in_files, in_memory = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "memory.safetensors")
    assert all(torch.equal(in_files[name], in_memory[name]) for name in in_memory)
    expected = torch.stack([expert["scale"] for expert in experts]).median(dim=0).values * 2
    assert torch.equal(in_files["scale"], expected)


def test_a_merge_may_be_registered_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MERGES, "_known", dict(MERGES._known))
    space: dict[str, object] = {"__name__": "their_merges"}
    exec(compile(MEDIAN, "their_merges.py", "exec"), space)
    assert "median" not in MERGES
    unmergeable.merges.register_merge(space["Median"])  # type: ignore[type-var]
    _, experts = make_models(3)
    merged = merge_state_dicts(None, experts, method=unmergeable.merges.merge_method("median"))
    assert torch.equal(merged["scale"], torch.stack([expert["scale"] for expert in experts]).median(dim=0).values)
