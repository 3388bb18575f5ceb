"""The registry holds every method of the folder under its own name."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import unmergeable
from attacks.planted import Build
from unmergeable import attacks
from unmergeable.attacks import ATTACKS, Attack, AttackRequirements, Inputs, Recovered
from unmergeable.errors import UsageError
from unmergeable.progress import Progress, silent
from unmergeable.registry import Registry


@dataclass(frozen=True)
class Halve:
    """An attack as another package would bring it: the base and the release, averaged."""

    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "half way back to the base"

    share: float = 0.5

    def validate(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"halve: share must lie in [0, 1], not {self.share}.")

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base",))

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        edits = {name: partial(self._mixed, inputs, name) for name in inputs.protected.names}
        return Recovered(inputs.protected, edits, {"share": self.share})

    def _mixed(self, inputs: Inputs, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.lerp(tensor, inputs.base.tensor(name), self.share)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that announces ``halve`` is there, and nothing has been looked up yet."""
    point = importlib.metadata.EntryPoint("halve", f"{__name__}:Halve", "unmergeable.attacks")

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point] if group == point.group else []

    fresh = Registry(ATTACKS.kind, ATTACKS.group, [ATTACKS[name] for name in ATTACKS])
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    for attribute in ("_known", "_broken", "_has_looked"):
        monkeypatch.setattr(ATTACKS, attribute, getattr(fresh, attribute))


@pytest.mark.usefixtures("installed")
def test_an_attack_of_another_package_is_listed_and_carried_out(network: Build, tmp_path: Path) -> None:
    toy, base = network("llama"), network("llama", seed=1)
    (listed,) = [method for method in unmergeable.methods().to_json()["recoveries"] if method["name"] == "halve"]
    result = unmergeable.recover(
        toy.folder,
        base=network("llama", seed=1).folder,
        method="halve",
        settings={"share": "0.25"},
        out=tmp_path / "out",
    )

    assert listed == {
        "name": "halve",
        "summary": "half way back to the base",
        "exact": False,
        "needs": ["base"],
        "settings": [{"name": "share", "type": "float", "default": 0.5}],
    }
    assert (result.method, result.is_exact, result.findings) == ("halve", False, {"share": 0.25})
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: torch.lerp(tensor, base.base.tensors[name], 0.25) for name, tensor in toy.base.tensors.items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UsageError, match=r"halve: share must lie in \[0, 1\]"):
        unmergeable.recover(toy.folder, base=toy.folder, method="halve", settings={"share": 2}, out=tmp_path / "no")


def test_without_that_package_it_is_unknown(tmp_path: Path) -> None:
    """The control."""
    with pytest.raises(UsageError, match="no recovery is called 'halve'"):
        unmergeable.recover(tmp_path, base=tmp_path, method="halve", out=tmp_path / "out")


def test_a_class_with_four_members_is_an_attack() -> None:
    method: Attack = Halve()
    assert method.requirements().structure == "base"


def test_every_method_of_the_folder_is_registered() -> None:
    modules = [module.name for module in pkgutil.iter_modules(attacks.__path__)]
    found = {
        value
        for module in modules
        for value in vars(importlib.import_module(f"unmergeable.attacks.{module}")).values()
        if isinstance(value, type) and "summary" in vars(value)
    }

    assert found == set(ATTACKS.values())
    for name, method in ATTACKS.items():
        assert name == method.name == method.__module__.rpartition(".")[2]
        assert "base" in method().requirements().needs
