"""MergeGuard from files to a file."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from low_rank_folder import write_adapter
from toy_checkpoints import toy_checkpoint
from unmergeable.checkpoint.manifest import check_files, read_manifest
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.load import load_network
from unmergeable.ops.protect_result import ProtectResult
from unmergeable.ops.protection import protect as protect_files
from unmergeable.protections import MergeGuard
from unmergeable.protections.mergeguard.method import MergeGuardFacts
from zoo import TOYS, write_toy

QUICK = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert in bfloat16, and images labelled by the expert."""
    folder = tmp_path_factory.mktemp("mergeguard")
    write_toy(TOYS["vit"], folder / "base", dtype=torch.bfloat16)
    write_toy(TOYS["vit"], folder / "expert", seed=1, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, 3, 32, 32, generator=generator) + 5 * torch.randn(40, 3, 1, 1, generator=generator)
    with torch.no_grad():
        labels = load_network(folder / "expert")(pixel_values=pixels).logits.argmax(dim=-1)
    assert max(torch.bincount(labels)) < 30, "of one class no layer would be critical"
    np.savez(folder / "data.npz", pixel_values=pixels.numpy(), label=labels.numpy())
    np.savez(folder / "unlabelled.npz", pixel_values=pixels.numpy())
    return folder


def protect(work: Path, out: Path, **options: Any) -> ProtectResult:
    given = {"method": "mergeguard", "base": work / "base", "out": out, "data": work / "data.npz", **options}
    return protect_files(work / "expert", **given)


def facts(result: ProtectResult) -> Any:
    (step,) = result.steps
    assert isinstance(step.facts, MergeGuardFacts)
    return step.facts


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def layers() -> dict[str, tuple[str, ...]]:
    toy = toy_checkpoint("vit")
    return dict(MergeGuard().layers(toy.architecture, toy.tensors))


def test_masking_is_the_dense_formula(work: Path, tmp_path: Path) -> None:
    result = protect(work, tmp_path / "out", settings={"stages": "masking", "significant_share": 0.2})
    base, expert, written = tensors(work / "base"), tensors(work / "expert"), tensors(tmp_path / "out")
    assert facts(result).criticality is not None
    critical = set(facts(result).criticality.critical)
    assert len(critical) == math.ceil(0.1 * len(layers()))
    masked = [name for layer, names in layers().items() if layer not in critical for name in names]
    vectors = {name: (expert[name].float() - base[name].float()).abs() for name in masked}
    everything = torch.cat([vector.reshape(-1) for vector in vectors.values()])
    threshold = everything.sort(descending=True).values[math.ceil(0.2 * len(everything)) - 1]
    assert facts(result).threshold == float(threshold)
    assert facts(result).masked == math.ceil(0.2 * len(everything))
    for name in expert:
        expected = expert[name]
        if name in vectors:
            expected = torch.where(vectors[name] >= threshold, base[name], expert[name])
        assert torch.equal(written[name], expected), name
    # Control: something was masked, in some tensors and not in others.
    changed = {name for name in expert if not torch.equal(written[name], expert[name])}
    assert changed
    assert changed <= set(masked)
    assert "classifier.weight" not in changed
    assert not any("embeddings" in name for name in changed)


def test_says_what_it_did(work: Path, tmp_path: Path) -> None:
    result = protect(work, tmp_path / "out", settings=QUICK)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.details["recipe"]["settings"]["alpha"] == 0.01
    assert set(manifest.inputs) == {"source", "base"}
    assert check_files(tmp_path / "out") == ()
    found = result.to_json()
    assert set(found["accuracies"]) == {"expert", "trained", "protected"}
    assert found["accuracies"]["expert"] == 1  # the labels are the expert's
    assert len(found["losses"]) == 6
    assert found["method"] == "mergeguard"
    assert not found["dry_run"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("low_rank", [0, 2])
def test_training_alone_changes_matrices_in_blocks(work: Path, tmp_path: Path, low_rank: int) -> None:
    settings = {**QUICK, "stages": "training", "low_rank": low_rank}
    result = protect(work, tmp_path / "out", settings=settings)
    expert, written = tensors(work / "expert"), tensors(tmp_path / "out")
    changed = {name for name in expert if not torch.equal(expert[name], written[name])}
    inside = {name for names in layers().values() for name in names}
    assert changed == {name for name in inside if expert[name].dim() > 1}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert facts(result).threshold is None
    assert facts(result).criticality is None


def test_a_low_rank_expert_is_merged_into_the_base_first(work: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(work / "base", merged)
    layer = "vit.encoder.layer.0.attention.attention.query"
    write_adapter(adapter, work / "base", layer, merged=merged, scale=0.3)
    options = {"method": "mergeguard", "base": work / "base", "data": work / "data.npz", "settings": QUICK}
    first = protect_files(adapter, out=tmp_path / "first", **options)
    second = protect_files(merged, out=tmp_path / "second", **options)
    assert facts(first) == facts(second)
    found, expected = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # Control: another expert gives other weights.
    protect_files(work / "expert", out=tmp_path / "third", **options)
    assert not torch.equal(tensors(tmp_path / "third")[f"{layer}.weight"], found[f"{layer}.weight"])


def test_both_stages_are_one_after_the_other(work: Path, tmp_path: Path) -> None:
    both = protect(work, tmp_path / "both", settings=QUICK)
    protect(work, tmp_path / "trained", settings={**QUICK, "stages": "training"})
    assert facts(both).criticality is not None
    base, trained, written = tensors(work / "base"), tensors(tmp_path / "trained"), tensors(tmp_path / "both")
    for layer, names in layers().items():
        for name in names:
            vector = (trained[name].float() - base[name].float()).abs()
            is_masked = vector >= facts(both).threshold if layer not in facts(both).criticality.critical else vector < 0
            assert torch.equal(written[name], torch.where(is_masked, base[name], trained[name])), name


def test_masking_needs_no_data_where_no_layer_is_excluded(work: Path, tmp_path: Path) -> None:
    settings = {"stages": "masking", "excluded_layers": 0}
    result = protect(work, tmp_path / "out", data=None, settings=settings)
    assert facts(result).criticality is None
    assert not facts(result).accuracies
    base, written = tensors(work / "base"), tensors(tmp_path / "out")
    masked = sum(int((written[name] == base[name]).sum()) for names in layers().values() for name in names)
    assert masked >= facts(result).masked > 0


LONGER = {"steps": 110, "batch_size": 4, "learning_rate": 1e-3, "excluded_layers": 0.3}

KILLED = f"""
import os, signal, sys
from pathlib import Path
import torch
from unmergeable.ops.protection import protect

torch.set_num_threads(1)

def kill(stage, done, total, unit):
    if stage == "dispersing" and done == 105:
        os.kill(os.getpid(), signal.SIGKILL)

work = Path(sys.argv[1])
options = dict(base=work / "base", out=Path(sys.argv[2]), data=work / "data.npz", settings={LONGER})
protect(work / "expert", method="mergeguard", progress=kill, **options)
"""


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Sums of other numbers of threads round differently, and a process that is started has a number of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_torch_thread")
def test_killed_in_any_stage_it_goes_on_to_the_same_bytes(work: Path, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def run(out: str, stop_at: str = "") -> list[str]:
        stages: list[str] = []

        def progress(stage: str, done: int, total: int, unit: str) -> None:
            stages.append(stage)
            if stage == stop_at and done > 0:
                raise Stopped

        protect(work, tmp_path / out, settings=LONGER, progress=progress)
        return stages

    assert run("whole").count("dispersing") == 111
    command = [sys.executable, "-c", KILLED, str(work), str(tmp_path / "out")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    kept = tmp_path / "out.training"
    assert [path.name for path in kept.iterdir()] == ["state.safetensors"]
    for stop_at, file in (("ranking layers", "trained.safetensors"), ("ranking weights", "critical.json")):
        with pytest.raises(Stopped):
            run("out", stop_at)
        assert (kept / file).is_file()
        assert not (tmp_path / "out").exists()
    stages = run("out")
    assert not {"dispersing", "ranking layers"} & set(stages)  # neither is done again
    assert not kept.exists()
    for name in ("model.safetensors", "unmergeable.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_dry_run_writes_nothing(work: Path, tmp_path: Path) -> None:
    result = protect(work, tmp_path / "out", dry_run=True)
    assert result.is_dry_run
    assert facts(result).layers == len(layers())
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="no label"):
        protect(work, tmp_path / "out", dry_run=True, data=work / "unlabelled.npz")


def test_refuses_before_any_work(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="significant_share must"):
        protect(work, out, settings={"significant_share": 1.1})
    with pytest.raises(UsageError, match="stages must be one of both, training, masking"):
        protect(work, out, settings={"stages": "second"})
    with pytest.raises(UsageError, match="give some with data=FILE"):
        protect(work, out, data=None)
    with pytest.raises(UsageError, match="reads no data: leave out data"):
        protect(work, out, settings={"stages": "masking", "excluded_layers": 0})
    with pytest.raises(UsageError, match="leaves none of"):
        protect(work, out, settings={"excluded_layers": 0.999})
    with pytest.raises(BadInput, match="no label"):
        protect(work, out, data=work / "unlabelled.npz")
    with pytest.raises(BadInput, match="parent folder"):
        protect(work, tmp_path / "none" / "out")
    with pytest.raises(BadInput, match=r"base .* does not exist"):
        protect(work, out, base=work / "nowhere")
    out.mkdir()
    with pytest.raises(BadInput, match="exists: choose another"):
        protect(work, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
