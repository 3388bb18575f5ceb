from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polynomials.conftest import Build
from polynomials.written import FAMILIES, Original, basis_for, load_written, relative
from toy_checkpoints import toy_checkpoint
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput, UnsupportedArchitecture, UsageError
from unmergeable.polynomials.activations import evaluate, require_activation
from unmergeable.polynomials.layout import SECTION, Section, activation_name, layout_of
from unmergeable.polynomials.rewriting import Polynomials, expand, rewriting
from zoo import load_toy, outputs

EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


class Expected(nn.Module):
    """The activation function with its polynomials in its place, unit by unit, in float64."""

    def __init__(self, original: Original, block: Any, polynomials: Polynomials) -> None:
        super().__init__()
        source = original.source
        z = block.gate or block.up
        self.bias = source.tensor(z.bias).double() if z.bias else torch.zeros(block.size, dtype=torch.float64)
        name = activation_name(source.config, layout_of(original.architecture))
        self.activation = require_activation(name, polynomials.basis)
        self.basis = polynomials.basis
        dtype = source.tensor(block.down.weight).dtype
        bias = source.tensor(z.bias) if z.bias else None
        self.expansion = expand(original.ranges[block.name], bias, self.activation, polynomials, dtype)

    def forward(self, z: Tensor) -> Tensor:
        found, units = self.activation.value(z.double()), self.expansion.units
        t = (z.double()[..., units] - self.bias[units] - self.expansion.centre.double()) / self.expansion.scale.double()
        reach = self.expansion.reach.double()
        found[..., units] = evaluate(self.basis, self.expansion.a, torch.minimum(torch.maximum(t, -reach), reach))
        return found.to(z.dtype)


def with_polynomials(original: Original, polynomials: Polynomials) -> Any:
    """The original network with its activation functions replaced: W and all in it."""
    network = load_toy(original.folder, original.toy).double()
    layout = layout_of(original.architecture)
    root = getattr(network, network.base_model_prefix, network)
    section = original.rewriting(polynomials).section
    for block, place in zip(original.architecture.feed_forwards, section.feed_forwards, strict=True):
        module = root.get_submodule(place.module)
        path = place.activation or f"{place.module}.{'act' if layout.stem == 'T5' else 'act_fn'}"
        parent, _, name = path.rpartition(".")
        assert module is not None
        setattr(root.get_submodule(parent), name, Expected(original, block, polynomials))
    return network


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("name", FAMILIES)
def test_written_network_computes_its_polynomials(name: str, share: float, toy: Build, tmp_path: Path) -> None:
    """Against the original with polynomials for activation functions. Coefficients are rounded once, and the sums over
    N + 1 terms and hidden units in float32; layers and norms carry errors on."""
    original = toy(name)
    polynomials = Polynomials(basis_for(name), 4, share)
    network = load_written(original.write(tmp_path / "out", polynomials))
    expected = outputs(with_polynomials(original, polynomials), original.toy)

    bound = 200 * EPSILON[torch.float32] * (1 + polynomials.order)
    assert relative(outputs(network, original.toy), expected) <= bound
    # Control: the polynomials are not the functions.
    assert relative(expected, outputs(load_toy(original.folder, original.toy), original.toy)) > 5 * bound


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_higher_orders_come_nearer_to_the_expert(name: str, toy: Build, tmp_path: Path) -> None:
    original = toy(name)
    expert = outputs(load_toy(original.folder, original.toy), original.toy)
    errors = [
        relative(
            outputs(load_written(original.write(tmp_path / f"{n}", Polynomials("taylor", n, 0.5))), original.toy),
            expert,
        )
        for n in (2, 4, 8)
    ]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


@pytest.mark.parametrize("name", ["llama-bias-tied-mqa", "gpt2", "vit", "dinov2"])
def test_neither_the_projection_nor_hidden_biases_are_in_the_file(name: str, toy: Build, tmp_path: Path) -> None:
    original = toy(name)
    written = Checkpoint.open(original.write(tmp_path / "out", Polynomials("taylor", 6)))
    stored = {key: written.tensor(key) for key in written.names}

    for block in original.architecture.feed_forwards:
        for hidden in (block.down.weight, (block.gate or block.up).bias):
            if hidden is None:
                continue
            tensor = original.source.tensor(hidden)
            copies = (other for other in stored.values() if other.numel() == tensor.numel())
            assert not any(torch.equal(other.flatten(), tensor.flatten()) for other in copies)
            assert not any(torch.equal(other.T.flatten(), tensor.flatten()) for other in copies)
    # Control: everything else is copied.
    layout = layout_of(original.architecture)
    untouched = [key for key in original.source.names if "norm" in key or "ln_" in key]
    assert untouched
    for key in untouched:
        assert torch.equal(stored[layout.to_module_name(key)], original.source.tensor(key))


def test_configuration_names_classes_and_keeps_the_rest(toy: Build, tmp_path: Path) -> None:
    original = toy("qwen2")
    out = original.write(tmp_path / "out", Polynomials("taylor", 8, 0.7))
    config = json.loads((out / "config.json").read_text())
    before = json.loads((original.folder / "config.json").read_text())

    assert config["model_type"] == "polynomial_qwen2"
    assert config["auto_map"] == {
        "AutoConfig": "modeling_polynomial.PolynomialQwen2Config",
        "AutoModel": "modeling_polynomial.PolynomialQwen2Model",
        "AutoModelForCausalLM": "modeling_polynomial.PolynomialQwen2ForCausalLM",
    }
    changed = {"model_type", "architectures", "auto_map", SECTION}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    section = Section.from_config(config, "out")
    assert section == original.rewriting(Polynomials("taylor", 8, 0.7)).section
    assert {place.units for place in section.feed_forwards} == {56}  # 0.7 of 80
    # No part of it may look like the configuration of the original: transformers would take it for one.
    assert "model_type" not in config[SECTION]


def test_bfloat16_storage_costs_its_rounding(toy: Build, tmp_path: Path) -> None:
    """Centre and scale are rounded before coefficients are computed: only C_n carry roundings, as W did."""
    original = toy("llama", torch.bfloat16)
    polynomials = Polynomials("taylor", 8, 0.5)
    written = load_written(original.write(tmp_path / "out", polynomials))
    expected = outputs(with_polynomials(original, polynomials), original.toy)
    error = relative(outputs(written, original.toy), expected)

    # Two layers; every term of a sum with an error of its own, terms of either sign: a few roundings of the output.
    assert error <= 8 * EPSILON[torch.bfloat16]
    assert error > EPSILON[torch.float32] * 200 * 9  # control: it is there


def test_reports_errors_of_the_polynomials(toy: Build) -> None:
    original = toy("llama")
    errors = original.rewriting(Polynomials("taylor", 8, 0.5)).errors
    wide = original.rewriting(Polynomials("taylor", 8)).errors

    for name, found in errors.items():
        assert 0 < found["median"] <= found["largest"] <= found["largest_bound"]
        assert found["largest"] < wide[name]["largest"]


def test_units_with_narrow_ranges_are_taken(toy: Build) -> None:
    original = toy("gpt2")
    block = original.architecture.feed_forwards[0]
    ranges = original.ranges[block.name]
    bias = original.source.tensor(str(block.up.bias))
    activation = require_activation("gelu_new", "taylor")
    expansion = expand(ranges, bias, activation, Polynomials("taylor", 4, 0.25), torch.float32)

    assert len(expansion.units) == 20
    assert float(ranges.radius[expansion.units].max()) <= float(ranges.radius[expansion.rest].min())
    u = expansion.centre.double() + bias.double()[expansion.units]
    assert torch.allclose(u, ranges.centre[expansion.units], atol=1e-6)


def test_refuses_what_it_cannot_do(toy: Build) -> None:
    original = toy("llama")
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp: no activations of its 80 hidden units were seen"):
        rewriting(original.source, original.architecture, {}, Polynomials("taylor", 8))
    name = "model.layers.0.mlp"
    broken = {**original.ranges, name: replace(original.ranges[name], low=original.ranges[name].low / 0)}
    with pytest.raises(BadInput, match="not finite"):
        rewriting(original.source, original.architecture, broken, Polynomials("taylor", 8))
    with pytest.raises(UnsupportedArchitecture, match="model type bloom: no network of polynomials"):
        layout_of(replace(original.architecture, family="bloom"))
    with pytest.raises(UnsupportedArchitecture, match=r"0\.mlp\.weights_in\.weight holds gate and up-branch in one"):
        layout_of(toy_checkpoint("dinov2-swiglu").architecture)
    with pytest.raises(UsageError, match="relu has no Taylor series"):
        toy("opt").rewriting(Polynomials("taylor", 8))
    for wrong in (Polynomials("taylor", 0), Polynomials("taylor", 8, 0.0), Polynomials("taylor", 8, mask_order=0)):
        with pytest.raises(UsageError, match="taylor_mlp: "):
            wrong.require_valid("taylor_mlp")
    with pytest.raises(BadInput, match="has no 'polynomial' section"):
        Section.from_config({}, "plain")
    with pytest.raises(BadInput, match="damaged"):
        Section.from_config({SECTION: {"feed_forwards": [{}]}}, "plain")
