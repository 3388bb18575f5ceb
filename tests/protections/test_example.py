"""A protection of one's own is one class: a whole trained one, and one that another package brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import unmergeable
from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.checkpoint.plan import output_like
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.cli import main
from unmergeable.data import DataSource
from unmergeable.errors import UsageError
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.protections import PROTECTIONS, Facts, Inputs, Protection, ProtectionRequirements, Rewrite
from zoo import TOYS, write_toy


@dataclass(frozen=True)
class TrainedFacts(Facts):
    losses: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def lines(self) -> list[str]:
        return [f"  Trained for {len(self.losses)} steps"] if self.losses else []


@dataclass(frozen=True)
class Blunt(Protection):
    """Trains all matrices towards smaller logits: no good protection, and a complete one."""

    name: ClassVar[str] = "blunt"
    summary: ClassVar[str] = "training towards small logits"
    remark: ClassVar[str] = "Stops nobody."

    rate: float = 1e-2
    steps: int = 2

    def validate(self) -> None:
        if self.steps < 1:
            raise UsageError(f"blunt: steps must be at least 1, not {self.steps}.")

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements(needs=("data",))

    def check(self, inputs: Inputs) -> Facts:
        if inputs.extras.data is None:
            raise UsageError("blunt is trained on data; give some with data=FILE.")
        return TrainedFacts()

    def prepare(self, inputs: Inputs) -> Rewrite:
        self.check(inputs)
        network = inputs.load_expert()
        batches = EncodedData(DataSource(inputs.extras.data), Encoder(inputs.template), 8)
        optimizer, losses = torch.optim.SGD(network.parameters(), self.rate), []
        for _, batch in zip(range(self.steps), batches, strict=False):
            loss = network(**batch.inputs).logits.square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        trained = to_disk_names(network, network.state_dict())
        edits = {name: lambda stored, name=name: trained[name].to(stored.dtype) for name in inputs.expert.names}
        facts = TrainedFacts(tuple(losses))
        return Rewrite(inputs.expert, output_like(inputs.expert, edits), self.recipe(), f"blunt {losses}", facts)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROTECTIONS, "_known", dict(PROTECTIONS._known))
    unmergeable.register_protection(Blunt)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["gpt2"], tmp_path / name, seed=seed)
    np.savez(tmp_path / "data.npz", input_ids=np.random.default_rng(0).integers(3, 67, size=(16, 11)))
    return tmp_path


@pytest.mark.usefixtures("registered")
def test_one_class_is_a_whole_protection(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = next(entry for entry in unmergeable.methods().protections if entry.name == "blunt")
    assert (entry.exact, entry.needs, [setting.name for setting in entry.settings]) == (
        False,
        ("data",),
        ["rate", "steps"],
    )
    places = [str(work / "expert"), "--base", str(work / "base"), "--method", "blunt", "--set", "steps=2", "--quiet"]
    assert main(["protect", *places, "--out", str(work / "out")]) == 2
    assert "blunt is trained on data" in capsys.readouterr().err
    places += ["--data", str(work / "data.npz")]
    assert main(["protect", *places, "--out", str(work / "out"), "--dry-run"]) == 0
    assert "Would protect" in capsys.readouterr().out
    assert not (work / "out").exists()

    assert main(["protect", *places, "--out", str(work / "out")]) == 0
    text = capsys.readouterr().out
    assert "  Trained for 2 steps" in text
    assert "Stops nobody." in text
    assert main(["protect", *places, "--out", str(work / "again"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"] == {"rate": 0.01, "steps": 2}
    assert len(document["losses"]) == 2

    expert, out = Checkpoint.open(work / "expert"), Checkpoint.open(work / "out")
    assert any(not torch.equal(expert.tensor(name), out.tensor(name)) for name in expert.names)
    both = {"base": work / "base", "data": work / "data.npz", "out": work / "both"}
    assert len(unmergeable.protect(work / "expert", method="blunt,gauge", **both).steps) == 2
    with pytest.raises(UsageError, match=r"write blunt,gauge\."):
        unmergeable.protect(work / "expert", method="gauge,blunt", **{**both, "out": work / "no"})


PACKAGE = """
from dataclasses import dataclass
from typing import ClassVar

from unmergeable.checkpoint.plan import output_like
from unmergeable.protections import Protection, ProtectionRequirements, Rewrite


@dataclass(frozen=True)
class Halved(Protection):
    name: ClassVar[str] = "halved"
    summary: ClassVar[str] = "every weight halved"
    remark: ClassVar[str] = "Stops nobody who can multiply."

    def requirements(self):
        return ProtectionRequirements()

    def prepare(self, inputs):
        edits = {name: lambda tensor: tensor / 2 for name in inputs.expert.names}
        return Rewrite(inputs.expert, output_like(inputs.expert, edits), self.recipe(), "halved")
"""

USE = """
import sys, unmergeable
from unmergeable.evaluation.plans.entries import read_protection
from pathlib import Path
work = Path(sys.argv[1])
assert "halved" in [entry.name for entry in unmergeable.methods().protections]
unmergeable.protect(work / "expert", base=work / "base", out=work / "out", method="halved")
entry = read_protection("halved", "the plan", folder=work)
assert (entry.method, entry.is_exact, set(entry.reads)) == ("halved", False, set())
"""


def test_an_installed_package_brings_its_protection_along(work: Path) -> None:
    site = work / "site"
    info = site / "halved-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "halved.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halved\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[unmergeable.protections]\nhalved = halved:Halved\n")
    paths = [str(site), str(Path(unmergeable.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}\n{USE}"
    ran = subprocess.run([sys.executable, "-c", code, str(work)], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expert, out = Checkpoint.open(work / "expert"), Checkpoint.open(work / "out")
    assert all(torch.equal(out.tensor(name), expert.tensor(name) / 2) for name in expert.names)


def test_what_is_no_protection_is_refused() -> None:
    class Foreign:
        name = "foreign"

    with pytest.raises(UsageError, match="Foreign is no protection: derive it from"):
        unmergeable.register_protection(Foreign)  # type: ignore[type-var]
    assert "foreign" not in PROTECTIONS
