"""Releases that somebody else made: scored by their own network, merged where they can be, judged by attacks only."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from unmergeable import ops
from unmergeable.attacks import ATTACKS
from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput
from unmergeable.evaluation.audits import audit
from unmergeable.evaluation.report.page import render_report
from unmergeable.evaluation.report.verdict import judgement, verdict
from unmergeable.evaluation.results import AuditResult
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.progress import Progress, silent
from unmergeable.tasks import FeatureHead, read_head, write_head

QUICK = {"coefficients": {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}, "connectivity": 0}


def wider(folder: Path, out: Path, head: Path) -> None:
    """The same function at twice the width: every feature is there twice, and [x, x] has the mean and variance of x."""
    config = ViTConfig.from_pretrained(folder)
    double = {
        name: twice(name, tensor)
        for name, tensor in ViTModel.from_pretrained(folder, add_pooling_layer=False).state_dict().items()
    }
    wide = ViTConfig.from_pretrained(
        folder,
        hidden_size=2 * config.hidden_size,
        intermediate_size=2 * config.intermediate_size,
        num_attention_heads=2 * config.num_attention_heads,
    )
    network = ViTModel(wide, add_pooling_layer=False).eval()
    network.load_state_dict(double)
    network.save_pretrained(out)
    own = read_head(head)
    write_head(FeatureHead(torch.cat([own.weight, own.weight], 1) / 2, own.bias, own.pooling), out / "head.safetensors")


def twice(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        return torch.cat([tensor, tensor], -1)
    if name == "embeddings.patch_embeddings.projection.weight" or tensor.dim() == 1:
        return torch.cat([tensor, tensor])
    return torch.cat([torch.cat([tensor, tensor], 1) / 2] * 2)  # reads the mean of both copies, writes both


@pytest.fixture
def releases(plan_file: Path, document: dict[str, Any]) -> Path:
    """The folder of the plan with three releases of ``mine``: in half precision, in another basis, and wider."""
    folder = plan_file.parent
    state = load_file(folder / "mine" / "model.safetensors")
    shutil.copytree(folder / "mine", folder / "half")
    save_file(
        {name: t.bfloat16() for name, t in state.items()}, folder / "half" / "model.safetensors", {"format": "pt"}
    )
    ops.protect(
        folder / "mine", base=folder / "base", out=folder / "turned", key=folder / "key", method="mergelock", seed=0
    )
    wider(folder / "mine", folder / "wide", folder / "mine-head.safetensors")
    return folder


def run(
    folder: Path, document: dict[str, Any], methods: list[dict[str, Any]], out: Path, **changes: Any
) -> AuditResult:
    plan = {**document, **QUICK, "protect": {"expert": "mine", "methods": methods}, **changes}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return audit(folder / "plan.yaml", out=out, workers=1)


def test_releases_in_any_structure(releases: Path, document: dict[str, Any], tmp_path: Path) -> None:
    methods = [
        {"name": "half", "checkpoint": "half"},
        {"name": "turned", "checkpoint": "turned", "recovered": "mine"},
        {"name": "wide", "checkpoint": "wide", "head": "wide/head.safetensors"},
    ]
    found = run(releases, document, methods, tmp_path / "out", connectivity=3)
    expert = found.alone["identity (seed 0)"]["mine-task"]
    # Alone each is the expert: the wider one by its own network, whose features its own head reads.
    assert found.alone["turned (seed 0)"]["mine-task"] == pytest.approx(expert, abs=0.01)
    assert found.alone["wide (seed 0)"] == {"mine-task": pytest.approx(expert, abs=0.01)}
    assert expert - found.alone["base"]["mine-task"] > 0.3  # control: not the base's network that happens to score
    ordinary = {name: found.protections[name].tiers[ThreatModel.OFF_THE_SHELF] for name in ("half", "turned", "wide")}
    # What is stored in another precision is converted, and merges as the expert does.
    assert ordinary["half"].trials[0].attacks_tried == 2
    assert abs(ordinary["half"].worst.d_star) <= 0.05  # type: ignore[union-attr, arg-type]
    hidden, found_out = ordinary["turned"].worst, found.protections["turned"].tiers[ThreatModel.WHITE_BOX].worst
    assert hidden is not None
    assert found_out is not None
    assert hidden.protected < hidden.unprotected - 0.05
    assert found_out.protected == pytest.approx(hidden.unprotected, abs=0.01)
    # What has another structure is refused, for a reason that is recorded; nobody calls that a protection.
    assert ordinary["wide"].trials[0].attacks_tried == 0
    (refusal,) = [r for r in found.refused if (r.protection, r.merge, r.recovery) == ("wide", "task_arithmetic", None)]
    assert "num_attention_heads is 2 in the base but 4 in wide (seed 0)" in refusal.reason
    assert str(tmp_path) not in json.dumps(found.to_json()["refused"])
    assert judgement(ordinary["wide"]) == "cannot be judged"
    assert "no merge with it is possible" in verdict("wide", found.protections["wide"])
    assert {line.protection for line in found.connectivity} == {"identity", "scale", "half", "turned"}
    assert "recovered" not in render_report(found) or "--expert mine=" in render_report(found)


def test_a_given_recovery_is_an_attack_of_who_knows_the_method(
    releases: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    """It is all that undoes the change of structure; without it (control) nothing does."""
    entry = {"name": "wide", "checkpoint": "wide", "head": "wide/head.safetensors"}
    document["recoveries"] = ["kabsch"]
    given = run(releases, document, [{**entry, "recovered": "mine"}], tmp_path / "out")
    tiers = given.protections["wide"].tiers
    assert tiers[ThreatModel.OFF_THE_SHELF].trials[0].attacks_tried == 0
    worst = tiers[ThreatModel.WHITE_BOX].worst
    assert worst is not None
    assert worst.best["protected"].recovery == "given recovery"
    assert worst.d_star == 0
    assert "unmergeable merge --base base --expert mine=" in render_report(given)
    without = run(releases, document, [entry], tmp_path / "out")
    assert without.protections["wide"].tiers[ThreatModel.WHITE_BOX].trials[0].attacks_tried == 0


@dataclass(frozen=True)
class Halve:
    """A recovery of another package, that knows how ``wider`` works."""

    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "one copy of every feature"

    def validate(self) -> None:
        """Nothing to set."""

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base",), structure="any")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        return Recovered(inputs.base, {name: partial(self._half, inputs.protected, name) for name in inputs.base.names})

    def _half(self, protected: TensorSource, name: str, ours: torch.Tensor) -> torch.Tensor:
        theirs = protected.tensor(name)[tuple(slice(size) for size in ours.shape)]
        return theirs * 2 if ours.dim() == 2 else theirs.clone()


def test_a_recovery_of_another_package_is_tried(
    releases: Path, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS._known, "halve", Halve)
    document["recoveries"] = ["halve"]
    entry = {"name": "wide", "checkpoint": "wide", "head": "wide/head.safetensors"}
    worst = run(releases, document, [entry], tmp_path / "out").protections["wide"].tiers[ThreatModel.WHITE_BOX].worst
    assert worst is not None
    assert worst.best["protected"].recovery == "halve"
    assert worst.protected == pytest.approx(worst.unprotected, abs=0.01)


CODE = '''
import torch
from transformers import ViTModel

class TwistedModel(ViTModel):
    """Reads images upside down."""

    def forward(self, pixel_values, **options):
        return super().forward(pixel_values.flip(-2), **options)
'''


@pytest.fixture
def twisted(releases: Path) -> Path:
    """A release whose own code is needed: without it the same tensors compute something else."""
    folder = releases / "twisted"
    shutil.copytree(releases / "mine", folder)
    state = ViTModel.from_pretrained(folder, add_pooling_layer=False).state_dict()  # names that its own class has
    kernel = "embeddings.patch_embeddings.projection.weight"
    state[kernel] = state[kernel].flip(2)
    positions = state["embeddings.position_embeddings"]
    side = int((positions.shape[1] - 1) ** 0.5)
    patches = positions[:, 1:].reshape(1, side, side, -1).flip(1).reshape(1, side * side, -1)
    state["embeddings.position_embeddings"] = torch.cat([positions[:, :1], patches], 1)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoModel": "modeling_twisted.TwistedModel"}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["TwistedModel"], "auto_map": auto}))
    (folder / "modeling_twisted.py").write_text(CODE)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return releases


def test_code_is_run_only_where_the_plan_says_so(twisted: Path, document: dict[str, Any], tmp_path: Path) -> None:
    entry = {"name": "twisted", "checkpoint": "twisted"}
    with pytest.raises(BadInput) as error:
        run(twisted, document, [entry], tmp_path / "out")
    assert "trust_remote_code: true" in str(error.value)
    assert "\n" not in str(error.value)
    found = run(twisted, document, [{**entry, "trust_remote_code": True}], tmp_path / "out")
    expert = found.alone["identity (seed 0)"]["mine-task"]
    assert found.alone["twisted (seed 0)"]["mine-task"] == pytest.approx(expert, abs=0.01)
    assert found.protections["twisted"].tiers[ThreatModel.OFF_THE_SHELF].trials[0].attacks_tried == 0
