from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polynomials.written import original
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.ops.merging import merge
from unmergeable.ops.protect_result import ProtectResult
from unmergeable.ops.protection import protect as protect_files
from unmergeable.ops.recovery import recover
from unmergeable.polynomials.rewriting import Polynomials
from unmergeable.protections.calibration import approximation
from unmergeable.protections.polynomial import PolynomialFacts
from zoo import TOYS, load_toy, outputs, write_toy


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base, an expert of it, and data as token ids."""
    for name, seed in (("base", 0), ("expert", 1)):
        write_toy(TOYS["gpt2"], tmp_path / name, seed=seed)
    ids = np.random.default_rng(0).integers(3, 67, size=(40, 11))
    np.savez(tmp_path / "data.npz", input_ids=ids)
    return tmp_path


def protect(work: Path, **options: Any) -> ProtectResult:
    options = {"base": work / "base", "out": work / "out", "method": "taylor_mlp", "data": work / "data.npz", **options}
    return protect_files(work / "expert", **options)


def facts(result: ProtectResult) -> Any:
    (step,) = result.steps
    assert isinstance(step.facts, PolynomialFacts)
    return step.facts


def test_protects_measures_and_says_so(work: Path) -> None:
    result = protect(work)
    manifest = read_manifest(work / "out")

    assert manifest is not None
    measured = manifest.details["measured"]
    assert 0 < measured["output_error"] < 1e-3
    assert 0 <= measured["outside_mean"] < 0.01  # measured on data it was calibrated on
    assert result.to_json()["approximation"] == measured
    assert set(facts(result).errors) == {"transformer.h.0.mlp", "transformer.h.1.mlp"}
    assert manifest.details["recipe"]["settings"]["order"] == 8
    assert "modeling_polynomial.py" in {file.name for file in manifest.outputs}
    assert json.loads((work / "out" / "config.json").read_text())["model_type"] == "polynomial_gpt2"
    # Control: a polynomial of first order is worse, and the measurement shows it.
    poor = protect(work, out=work / "poor", settings={"order": "1", "tolerance": "1e6"})
    assert facts(poor).approximation.output_error > 20 * facts(result).approximation.output_error


def test_a_merge_has_nothing_to_average(work: Path) -> None:
    protect(work)
    other = (work / "base", 0.5)
    with pytest.raises(Mismatch, match="model_type"):
        merge(experts=[(work / "out", 0.5), other], method="linear", out=work / "merged")
    merge(experts=[(work / "expert", 0.5), other], method="linear", out=work / "control")


def test_recovered_by_the_attack(work: Path) -> None:
    """Which ``inspect`` finds by itself."""
    protect(work, method="mergebarrier", settings={"parts": "ffn"})
    result = recover(work / "out", base=work / "base", method="auto", out=work / "plain")
    assert result.method == "taylor_inversion"
    expert, plain = Checkpoint.open(work / "expert"), Checkpoint.open(work / "plain")

    assert result.findings["feed_forwards_solved"] == 2
    for name in expert.names:
        tensor = expert.tensor(name)
        # Biases of the output lost digits to the constant that was added to them.
        assert torch.allclose(plain.tensor(name), tensor, rtol=0, atol=1e-5 * float(tensor.abs().max())), name


def test_attention_alone_needs_no_data_and_keeps_the_structure(work: Path) -> None:
    result = protect(work, method="mergebarrier", settings={"parts": "attention"}, data=None)
    toy = TOYS["gpt2"]
    found, expert = (outputs(load_toy(work / name, toy), toy) for name in ("out", "expert"))

    assert facts(result).approximation is None
    assert float((found - expert).norm() / expert.norm()) <= 64 * 2.0**-24
    key = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(Checkpoint.open(work / "out").tensor(key), Checkpoint.open(work / "expert").tensor(key))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "taylormlp"}, "did you mean 'taylor_mlp'"),
        ({"data": None}, "taylor_mlp is calibrated on data"),
        ({"settings": {"order": "0"}}, "order must lie between 1 and 32, not 0"),
        ({"method": "mergebarrier", "settings": {"top_k": "8"}}, "top_k=8 is not below the 8 directions"),
        ({"method": "mergebarrier", "settings": {"basis": "fourier"}}, "basis must be one of taylor, hermite"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(work: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        protect(work, **options)
    assert not (work / "out").exists()
    assert not (work / "out.partial").exists()


def test_does_not_overwrite(work: Path) -> None:
    (work / "out").mkdir()
    with pytest.raises(BadInput, match="exists"):
        protect(work)


def test_measures_the_error_without_padding(tmp_path: Path) -> None:
    llama = original("llama", tmp_path / "original")
    network = load_polynomial_network(llama.write(tmp_path / "out", Polynomials("taylor", 6, 0.7)))
    plain = load_network(llama.folder)
    ids = llama.inputs["input_ids"]
    padded = torch.cat([ids, torch.full((2, 30), 5)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 30, dtype=torch.int64)], dim=1)
    alone = approximation(plain, network, [EncodedBatch({"input_ids": ids})])
    with_padding = approximation(plain, network, [EncodedBatch({"input_ids": padded, "attention_mask": mask})])

    assert 0 < alone.output_error < 0.05
    # Rounding, of other sums in another order.
    assert with_padding.output_error == pytest.approx(alone.output_error, rel=1e-2)
    assert set(alone.to_json()) == {"output_error", "outside_largest", "outside_mean"}
    # Control: a network is at no distance from itself.
    assert approximation(network, network, [EncodedBatch({"input_ids": ids})]).output_error == 0
