"""What was planted in a release's structure is taken away, and the base's structure computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attacks.planted import Build, Network
from unmergeable import ops
from unmergeable.architecture import detect
from unmergeable.attacks import Inputs, LosslessPruning, NearestOrbit, lossless_pruning
from unmergeable.attacks.lossless_pruning import turned_units
from unmergeable.attacks.prepared import prepared
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import Mismatch
from unmergeable.evaluation.planted import KINDS, planted
from unmergeable.polynomials.activations import ACTIVATIONS
from zoo import TOYS, load_toy, outputs

TOLERANCE = 256 * torch.finfo(torch.float32).eps
"""The release is stored in float32, and what is traded there is some ten times the weights."""

STRUCTURES = (
    "idle_layer",
    "split_layer",
    "wider_feed_forwards",
    "turned_units",
    "saturated_units",
    "more_heads",
    "split_heads",
    "wider_heads",
)
HIDDEN = (*STRUCTURES, *(kind for kind in KINDS if kind not in STRUCTURES and kind != "untied"))
COVERING = ("llama", "bert-embedding", "dinov2", "t5")
MORE = ("qwen3", "gemma2", "gpt2", "opt", "vit", "roberta", "flan-t5")
EVERY = [*COVERING, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def released(network: Network, kinds: tuple[str, ...], seed: int = 1) -> tuple[MemorySource, tuple[str, ...]]:
    made = planted(network.expert(0.1), network.architecture, seed, kinds)
    return made.source, made.kinds


def pruned(network: Network, release: MemorySource) -> MemorySource:
    first = prepared(Inputs(release, network.base, network.architecture))
    result = LosslessPruning().recover(first.inputs).template
    return MemorySource({name: result.tensor(name) for name in result.names}, {**result.config, **first.changes})


def output(name: str, source: MemorySource, folder: Path) -> torch.Tensor:
    folder.mkdir()
    save_file(dict(source.tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    return outputs(load_toy(folder, TOYS[name], torch.float64), TOYS[name])


@pytest.mark.parametrize("name", EVERY)
def test_planted_structure_is_taken_away(name: str, network: Build, tmp_path: Path) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    expected = output(name, expert, tmp_path / "expert")
    tried = 0
    for kind in STRUCTURES:
        for seed in (1, 2):
            release, done = released(toy, (kind,), seed)
            if not done:
                continue
            tried += 1
            result = pruned(toy, release)
            assert {key: tensor.shape for key, tensor in result.tensors.items()} == {
                key: tensor.shape for key, tensor in expert.tensors.items()
            }, kind
            gap = output(name, result, tmp_path / f"{kind}-{seed}") - expected
            assert float(gap.norm() / expected.norm()) <= TOLERANCE, kind
    assert tried >= 4


@pytest.mark.parametrize("name", EVERY)
def test_structure_hidden_under_trades_and_bases_comes_back_to_the_expert(name: str, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    for seed in (1, 2):
        release, done = released(toy, HIDDEN, seed)
        assert len(done) > 3
        # What a block adds is compared with the base's block of the same number, once there are as many.
        result = prepared(Inputs(pruned(toy, release), toy.base, toy.architecture)).inputs.protected
        estimate = NearestOrbit().estimate(result, toy.base, toy.architecture)
        template = estimate.template or result
        found = toy.transformed(
            MemorySource({key: template.tensor(key) for key in template.names}, result.config), *estimate.gauges
        )
        assert toy.distance(found) <= 1.02 * toy.distance(expert)


def _heads(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor.reshape(count, -1, tensor.shape[-1])


def with_own_keys(source: MemorySource) -> MemorySource:
    """Every query head has keys and values of its own, each in a basis that is drawn."""
    generator = torch.Generator().manual_seed(3)
    config, tensors = dict(source.config), {key: tensor.double().clone() for key, tensor in source.tensors.items()}
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    for name in [name for name in tensors if name.endswith(("k_proj.weight", "v_proj.weight"))]:
        tensors[name] = _heads(tensors[name], shared).repeat_interleave(heads // shared, 0).flatten(0, 1)
    for name in [name for name in tensors if name.endswith("v_proj.weight")]:
        values, output = _heads(tensors[name], heads), name.replace("v_proj", "o_proj")
        columns = _heads(tensors[output].T.contiguous(), heads)
        for head in range(heads):
            basis = torch.randn(values.shape[1], values.shape[1], generator=generator, dtype=torch.float64)
            values[head], columns[head] = basis @ values[head], torch.linalg.inv(basis).T @ columns[head]
            # Rotary positions let a common phase of each pair by.
            query, key = name.replace("v_proj", "q_proj"), name.replace("v_proj", "k_proj")
            half = values.shape[1] // 2
            phase = torch.rand(half, generator=generator, dtype=torch.float64) * 6
            for tensor in (query, key):
                rows = _heads(tensors[tensor], heads)[head]
                first, second = rows[:half].clone(), rows[half:].clone()
                rows[:half] = phase.cos()[:, None] * first - phase.sin()[:, None] * second
                rows[half:] = phase.sin()[:, None] * first + phase.cos()[:, None] * second
        tensors[output] = columns.flatten(0, 1).T.contiguous()
    return MemorySource(_as_stored(source, tensors), config | {"num_key_value_heads": heads})


def with_idle_heads(source: MemorySource) -> MemorySource:
    """As many key-value heads again, with queries of their own, that look and add nothing."""
    generator = torch.Generator().manual_seed(3)
    config, tensors = dict(source.config), dict(source.tensors)
    size = config["hidden_size"] // config["num_attention_heads"]
    for name, tensor in source.tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            more = tensor.std() * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            tensors[name] = torch.cat([more, tensor])
        if name.endswith("o_proj.weight"):
            tensors[name] = torch.cat([torch.zeros_like(tensor), tensor], 1)
    for key in ("num_attention_heads", "num_key_value_heads"):
        config[key] *= 2
    return MemorySource(tensors, config | {"head_dim": size})


def with_constant_units(source: MemorySource) -> MemorySource:
    """Twice as wide feed-forwards: the new units read nothing, and what they add the output bias takes back."""
    generator = torch.Generator().manual_seed(3)
    tensors = {key: tensor.double() for key, tensor in source.tensors.items()}
    for name in [name for name in tensors if name.endswith("fc1.weight")]:
        bias, down = torch.randn(len(tensors[name]), generator=generator).double(), name.replace("fc1", "fc2")
        columns = torch.randn(tensors[down].shape, generator=generator).double()
        out_bias = down.replace("weight", "bias")
        tensors[out_bias] = tensors[out_bias] - columns @ torch.nn.functional.gelu(bias)
        tensors[down] = torch.cat([columns, tensors[down]], 1)
        tensors[name.replace("weight", "bias")] = torch.cat([bias, tensors[name.replace("weight", "bias")]])
        tensors[name] = torch.cat([torch.zeros_like(tensors[name]), tensors[name]])
    return MemorySource(_as_stored(source, tensors), {**source.config, "mlp_ratio": 2 * source.config["mlp_ratio"]})


def with_wider_stream(source: MemorySource, *, turned: bool) -> MemorySource:
    """Twice as wide a stream, one half of which is zero; as stored, or in a basis that is drawn."""
    generator = torch.Generator().manual_seed(3)
    config, tensors = dict(source.config), {key: tensor.double() for key, tensor in source.tensors.items()}
    width = config["hidden_size"]
    basis = torch.eye(2 * width, dtype=torch.float64)
    if turned:
        basis = torch.linalg.qr(torch.randn(2 * width, 2 * width, generator=generator, dtype=torch.float64)).Q
    wider = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            wider[name] = torch.ones(2 * width)
        elif name.endswith("embed_tokens.weight"):
            wider[name] = torch.cat([tensor, torch.zeros_like(tensor)], 1) @ basis.T
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            wider[name] = basis @ torch.cat([tensor, torch.zeros_like(tensor)], 0)
        else:
            block, _, _ = name.partition("self_attn." if "self_attn" in name else "mlp.")
            norm = "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
            gain = tensors["model.norm.weight" if name == "lm_head.weight" else f"{block}{norm}.weight"]
            wider[name] = torch.cat([tensor * gain, torch.zeros_like(tensor)], 1) @ basis.T / 2**0.5
    sizes = {"hidden_size": 2 * width, "head_dim": width // config["num_attention_heads"]}
    return MemorySource(_as_stored(source, wider), {**config, **sizes, "rms_norm_eps": config["rms_norm_eps"] / 2})


def _as_stored(source: MemorySource, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.to(source.tensors[key].dtype).contiguous() for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", with_own_keys),
        ("llama", with_idle_heads),
        ("llama", partial(with_wider_stream, turned=False)),
        ("llama", partial(with_wider_stream, turned=True)),
        ("dinov2", with_constant_units),
    ],
)
def test_heads_and_units_that_are_there_for_show(
    name: str, change: Callable[[MemorySource], MemorySource], network: Build, tmp_path: Path
) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    release = change(expert)
    expected = output(name, expert, tmp_path / "expert")
    scale = expected.norm()
    assert float((output(name, release, tmp_path / "release") - expected).norm() / scale) <= TOLERANCE
    result = pruned(toy, release)
    assert {key: tensor.shape for key, tensor in result.tensors.items()} == {
        key: tensor.shape for key, tensor in expert.tensors.items()
    }
    assert float((output(name, result, tmp_path / "pruned") - expected).norm() / scale) <= TOLERANCE
    found = NearestOrbit().estimate(result, toy.base, toy.architecture)
    # Gains that were folded are fitted again, each to a few numbers in a network this small.
    assert found.after <= 1.05 * NearestOrbit().estimate(expert, toy.base, toy.architecture).after
    # The control: the same structure whose parts all do something.
    generator = torch.Generator().manual_seed(2)
    other = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for key, tensor in release.tensors.items()
    }
    with pytest.raises(Mismatch, match="each of them does something"):
        pruned(toy, MemorySource(other, release.config))


def test_what_does_something_is_not_taken_away(network: Build) -> None:
    """The control: one idle block's last weight is no longer zero, or no two units are alike."""
    toy = network("llama")
    for kind in ("idle_layer", "wider_feed_forwards", "more_heads"):
        release, _ = released(toy, (kind,))
        generator = torch.Generator().manual_seed(2)
        other = {
            key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in release.tensors.items()
        }
        with pytest.raises(Mismatch, match="does something; run block_regression"):
            pruned(toy, MemorySource(other, release.config, Path("release")))


def test_a_release_of_the_bases_structure_stays_as_it_is(network: Build) -> None:
    toy = network("dinov2")
    expert = toy.expert(0.1)
    recovered = LosslessPruning().recover(Inputs(expert, toy.base, toy.architecture))
    assert recovered.template is expert
    assert recovered.findings == {"taken_away": "nothing"}


def test_inspect_sees_idle_structure_and_auto_takes_it_away(network: Build, tmp_path: Path) -> None:
    toy = network("llama")
    release, _ = released(toy, ("idle_layer", "more_heads"))
    output("llama", release, tmp_path / "release")
    (sign,) = ops.inspect(tmp_path / "release", base=toy.folder).to_json()["base"]["signs"]
    assert sign["name"] == "idle structure"
    assert "1 layers, 1 key-value heads in each block more than the base has" in sign["evidence"]
    result = ops.recover(tmp_path / "release", base=toy.folder, method="auto", out=tmp_path / "out")
    assert result.method == "lossless_pruning"
    assert ops.verify(tmp_path / "out", _written(toy, toy.expert(0.1), tmp_path / "expert")).is_equal
    # The control: with something in the idle layer it is another network.
    other = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        for key, tensor in release.tensors.items()
    }
    output("llama", MemorySource(other, release.config), tmp_path / "other")
    with pytest.raises(Mismatch, match="give the checkpoint it was fine-tuned from"):
        ops.inspect(tmp_path / "other", base=toy.folder)


def _written(toy: Network, source: MemorySource, folder: Path) -> Path:
    output(toy.name, source, folder)
    return folder


def test_a_vocabulary_in_another_order_comes_back(network: Build, tmp_path: Path) -> None:
    """With two tokens more; the control: a release that lacks one of the base's tokens is left as it is."""
    toy = network("llama")
    size = toy.base.config["vocab_size"]
    places = torch.randperm(size + 2, generator=torch.Generator().manual_seed(3))
    names = [f"token{number}" for number in range(size + 2)]
    expert = toy.expert(0.1)
    grown = dict(expert.tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.cat([expert.tensors[name], torch.ones(2, expert.tensors[name].shape[1])])
        grown[name] = rows[places.argsort()]  # token i in row places[i]
    for folder, ids in (
        ("base", {name: number for number, name in enumerate(names[:size])}),
        ("release", {name: int(places[number]) for number, name in enumerate(names)}),
        ("lacking", {name: int(places[number]) for number, name in enumerate(names) if number}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}, "added_tokens": []}))
    base = MemorySource(toy.base.tensors, toy.base.config, tmp_path / "base")
    config = {**toy.base.config, "vocab_size": size + 2}
    result = LosslessPruning().recover(
        Inputs(MemorySource(grown, config, tmp_path / "release"), base, toy.architecture)
    )
    assert result.findings == {"taken_away": "another order of the vocabulary"}
    assert result.config_changes == {"vocab_size": size}
    for name, tensor in expert.tensors.items():
        assert float((result.template.tensor(name) - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max()), name
    lacking = LosslessPruning().recover(
        Inputs(MemorySource(grown, config, tmp_path / "lacking"), base, toy.architecture)
    )
    assert lacking.findings == {"taken_away": "nothing"}


def test_in_memory(network: Build) -> None:
    toy = network("dinov2")
    release, _ = released(toy, ("idle_layer",))
    config: Any = toy.base.config
    result = lossless_pruning(release.tensors, toy.base.tensors, release.config, config)
    assert result.config["num_hidden_layers"] == config["num_hidden_layers"]
    shapes = {key: tuple(tensor.shape) for key, tensor in result.state_dict.items()}
    assert detect(result.config, shapes).family == toy.architecture.family


@pytest.mark.parametrize("name", COVERING)
def test_units_that_were_turned_round_come_back_from_half_precision(
    name: str, network: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs are told apart through roundings a hundred times as large as what tells float32 apart."""
    toy = network(name)
    expected = output(name, toy.expert(0.1), tmp_path / "expert")
    exact, done = released(toy, ("turned_units",))
    assert done == ("turned_units",)
    release = MemorySource({key: tensor.bfloat16() for key, tensor in exact.tensors.items()}, exact.config)
    rounded = output(name, MemorySource(dict(release.tensors), release.config), tmp_path / "release") - expected
    gap = output(name, pruned(toy, release), tmp_path / "pruned") - expected
    assert float(gap.norm()) <= 2 * float(rounded.norm()), "the roundings of the release, and of what comes back"
    # Control: the same units, all with the sign they came with, are another network.
    monkeypatch.setattr(turned_units, "_signs", lambda units, outputs, kept: torch.ones(len(kept)).double())
    wrong = output(name, pruned(toy, exact), tmp_path / "wrong") - expected
    assert float(wrong.norm()) > 20 * float(gap.norm())


def test_every_known_activation_lets_units_turn() -> None:
    for name, activation in ACTIVATIONS.items():
        assert turned_units.can_turn(activation.value), name
    assert not turned_units.can_turn(torch.tanh), "control: its odd part is not the identity"
