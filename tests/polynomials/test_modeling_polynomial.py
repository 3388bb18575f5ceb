from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polynomials.conftest import Build
from polynomials.written import load_written, relative
from unmergeable.optional import quiet
from unmergeable.polynomials.modeling_polynomial import PolynomialLinear, guard_counted
from unmergeable.polynomials.rewriting import Polynomials
from zoo import TOYS, load_toy, outputs

EPSILON = 2.0**-24


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generates_with_the_cache_as_without(name: str, toy: Build, tmp_path: Path) -> None:
    original = toy(name)
    basis = "hermite" if name == "opt" else "taylor"
    network = load_written(original.write(tmp_path / "out", Polynomials(basis, 6, 0.7)))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = original.inputs["input_ids"]
    with_cache = network.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    without = network.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)

    assert with_cache.shape == (2, ids.shape[1] + 8)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", ["llama", "vit", "dinov2", "flan-t5"])
def test_saves_and_reloads(name: str, toy: Build, tmp_path: Path) -> None:
    original = toy(name)
    network = load_written(original.write(tmp_path / "out", Polynomials("taylor", 6, 0.7)))
    network.save_pretrained(tmp_path / "again")
    again = load_written(tmp_path / "again")

    assert (tmp_path / "again" / "modeling_polynomial.py").is_file()
    assert torch.equal(outputs(again, original.toy), outputs(network, original.toy))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "bert-classification", "vit", "dinov2", "t5"])
def test_refuses_to_load_as_the_original(name: str, toy: Build, tmp_path: Path) -> None:
    import transformers

    original = toy(name)
    basis = "hermite" if name == "t5" else "taylor"
    out = original.write(tmp_path / "out", Polynomials(basis, 6, 0.7))
    kind = type(original.toy.build())

    with quiet(transformers):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            kind.from_pretrained(out)
        with pytest.raises(ValueError, match="trust_remote_code"):
            transformers.AutoModel.from_pretrained(out, trust_remote_code=False)
        assert kind.from_pretrained(original.folder)  # control


def test_base_model_loads_too(toy: Build, tmp_path: Path) -> None:
    import transformers

    original = toy("llama")
    out = original.write(tmp_path / "out", Polynomials("taylor", 6, 0.7))
    whole = load_written(out)
    with quiet(transformers):
        body = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, attn_implementation="eager").eval()

    assert type(body).__name__ == "PolynomialLlamaModel"
    with torch.no_grad():
        hidden = body(**original.inputs).last_hidden_state
        assert torch.equal(whole.lm_head(hidden).double(), outputs(whole, original.toy))


def test_loads_where_this_package_is_not_installed(toy: Build, tmp_path: Path) -> None:
    """A new interpreter in which importing it is an error: the file beside the weights is all there is."""
    original = toy("llama")
    out = original.write(tmp_path / "out", Polynomials("taylor", 6, 0.7))
    code = f"""
import sys
sys.modules["unmergeable"] = None
import torch, transformers
network = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
ids = torch.arange(3, 11)[None]
print(type(network).__name__, network.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1])
"""
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, env=environment
    )

    assert done.stdout.split() == ["PolynomialLlamaForCausalLM", "11"], done.stderr[-1000:]


def settings(**changes: Any) -> dict[str, Any]:
    masked = {"mask_order": 8, "mask_radius": 2.5}
    return {"basis": "taylor", "guard": "clamp", "order": 9, "activation": "silu", **masked, **changes}


def powers(guard: str) -> PolynomialLinear:
    """One unit, y = sum of t^n for n = 1 ... 9, centre 1, scale 2, reach 1.5."""
    module = PolynomialLinear(
        settings(guard=guard), {"units": 1, "rest": 0, "outputs": 1, "bias": 0}, is_gated=False
    ).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [2.0], [1.5]]))
        for coefficient in module.coefficients.values():
            coefficient.fill_(1.0)
    return module


@torch.no_grad()
def test_guards() -> None:
    near, far = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[7.0]], dtype=torch.float64)  # t = 0.5 and 3

    def total(t: float, orders: int) -> float:
        return sum(t**n for n in range(1, orders + 1))

    for guard in ("clamp", "mask", "none"):
        assert powers(guard)(near).item() == pytest.approx(total(0.5, 9), rel=1e-14)
    assert powers("clamp")(far).item() == pytest.approx(total(1.5, 9), rel=1e-14)
    assert powers("mask")(far).item() == pytest.approx(total(3.0, 7), rel=1e-14)
    assert powers("none")(far).item() == pytest.approx(total(3.0, 9), rel=1e-14)


@torch.no_grad()
def test_counts_how_often_the_guard_acts(toy: Build, tmp_path: Path) -> None:
    original = toy("llama")
    network = load_written(original.write(tmp_path / "out", Polynomials("taylor", 6, 0.7)))
    with guard_counted(network) as on_calibration:
        network(**original.inputs)
    with guard_counted(network) as elsewhere:
        network(**original.toy.inputs(torch.Generator().manual_seed(9)))
    network(**original.inputs)  # not counted

    units, tokens = 56, 22
    assert set(on_calibration) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    assert all(seen == units * tokens for _, seen in on_calibration.values())
    # Each unit's two extremes lie on the edge of its range, and rounding may push them over it.
    assert on_calibration["model.layers.0.mlp.down_proj"][0] <= 2 * units
    assert elsewhere["model.layers.0.mlp.down_proj"][0] > on_calibration["model.layers.0.mlp.down_proj"][0]


def test_section_of_the_file_is_what_the_network_reads(toy: Build, tmp_path: Path) -> None:
    original = toy("llama")
    out = original.write(tmp_path / "out", Polynomials("hermite", 5))
    network = load_written(out)
    section = json.loads((out / "config.json").read_text())["polynomial"]
    (first, *_) = (module for module in network.modules() if type(module).__name__ == "PolynomialLinear")

    assert section["basis"] == first.basis == "hermite"
    assert sorted(map(int, first.coefficients)) == list(range(section["order"] + 1))
    expert = outputs(load_toy(original.folder, TOYS["llama"]), original.toy)
    assert relative(outputs(network, original.toy), expert) < 0.5
