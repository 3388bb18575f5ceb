"""A release saved as another type of network: its numbers come back in the base's, if it computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmergeable import ops
from unmergeable.attacks import canonicalise, transcription
from unmergeable.attacks.transcription import transcribed
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.cli import main
from unmergeable.errors import BadInput
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy

Weights = dict[str, Tensor]
Config = dict[str, Any]
ROUNDING = 1e-5
"""Of outputs in float32, through two blocks."""

MULTIPLIERS = {
    "embedding_multiplier": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
    "logits_scaling": 8.0,
}


def fused(config: Config, weights: Mapping[str, Tensor]) -> tuple[Config, Weights]:
    """A Llama as Phi-3: queries, keys and values in one tensor, gate and up in another."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")]
            found[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif name.endswith("gate_proj.weight"):
            found[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, weights[name.replace("gate", "up")]])
        elif not any(kind in name for kind in ("k_proj", "v_proj", "mlp.up_proj")):
            found[name] = tensor
    return {**config, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, found


def multiplied(config: Config, weights: Mapping[str, Tensor]) -> tuple[Config, Weights]:
    """A Llama as Granite, whose config multiplies what the weights are divided by."""
    width = config["hidden_size"] // config["num_attention_heads"]
    factors = {
        "embed_tokens.weight": 1 / MULTIPLIERS["embedding_multiplier"],
        "q_proj.weight": width**-0.5 / MULTIPLIERS["attention_multiplier"],
        "o_proj.weight": 1 / MULTIPLIERS["residual_multiplier"],
        "down_proj.weight": 1 / MULTIPLIERS["residual_multiplier"],
        "lm_head.weight": MULTIPLIERS["logits_scaling"],
    }
    found = {
        name: tensor * next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
        for name, tensor in weights.items()
    }
    named = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    return {**config, **named, **MULTIPLIERS}, found


def mixed(config: Config, weights: Mapping[str, Tensor]) -> tuple[Config, Weights]:
    """A Llama as Mixtral: three experts that compute the same, each with its hidden units in an order of its own."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, tensor in weights.items():
        layer, is_inside, kind = name.partition(".mlp.")
        if not is_inside:
            found[name] = tensor
        elif kind == "gate_proj.weight":
            router = torch.randn(3, config["hidden_size"], generator=generator)
            found[f"{layer}.block_sparse_moe.gate.weight"] = router
            for expert in range(3):
                units = torch.arange(len(tensor))
                units = units[torch.randperm(len(tensor), generator=generator)] if expert else units
                place = f"{layer}.block_sparse_moe.experts.{expert}"
                found[f"{place}.w1.weight"] = tensor[units]
                found[f"{place}.w3.weight"] = weights[f"{layer}.mlp.up_proj.weight"][units]
                found[f"{place}.w2.weight"] = weights[f"{layer}.mlp.down_proj.weight"][:, units]
    named = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    return {**config, **named, "num_local_experts": 3, "num_experts_per_tok": 2}, found


RICHER: dict[str, Callable[[Config, Mapping[str, Tensor]], tuple[Config, Weights]]] = {
    "phi3": fused,
    "granite": multiplied,
}
DISGUISES = {**RICHER, "mixtral": mixed}


def write(folder: Path, config: Config, weights: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    return folder


def read(folder: Path) -> tuple[Config, Weights]:
    return json.loads((folder / "config.json").read_text()), load_file(next(folder.glob("*.safetensors")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``expert``, a fine-tune of it."""
    root = tmp_path_factory.mktemp("llama")
    config, base = read(write_toy(TOYS["llama"], root / "base"))
    config["attention_bias"] = config["mlp_bias"] = False
    write(root / "same", config, base)
    generator = torch.Generator().manual_seed(1)
    expert = {
        name: tensor + 0.03 * tensor.std(unbiased=False) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in base.items()
    }
    write(root / "expert", config, expert)
    return root


@torch.no_grad()
def answers(folder: Path) -> Tensor:
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    logits: Tensor = load_network(folder)(input_ids=ids).logits
    return logits.double()


def gap(first: Path, second: Path) -> float:
    expected = answers(first)
    return float((answers(second) - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", DISGUISES)
def test_a_llama_under_another_type_is_a_llama_again(kind: str, llama: Path, tmp_path: Path) -> None:
    release = write(tmp_path / "release", *DISGUISES[kind](*read(llama / "expert")))
    assert gap(llama / "expert", release) < ROUNDING, "the disguise computes what the expert does"
    result = ops.recover(release, base=llama / "base", out=tmp_path / "out", method="canonicalise")
    _, found = read(tmp_path / "out")
    for name, tensor in read(llama / "expert")[1].items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert gap(llama / "expert", tmp_path / "out") < ROUNDING
    assert f"{kind}, as a llama" in json.dumps(result.to_json())


@pytest.mark.parametrize("kind", RICHER)
def test_the_other_way_round(kind: str, llama: Path, tmp_path: Path) -> None:
    """A base of the richer type, and a release that was saved as a plain Llama."""
    base = write(tmp_path / "base", *DISGUISES[kind](*read(llama / "base")))
    ops.recover(llama / "expert", base=base, out=tmp_path / "out", method="canonicalise")
    config, found = read(tmp_path / "out")
    assert config["model_type"] == kind
    for name, tensor in DISGUISES[kind](*read(llama / "expert"))[1].items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert gap(llama / "expert", tmp_path / "out") < ROUNDING


@pytest.mark.parametrize("kind", DISGUISES)
def test_what_was_protected_first_is_found_behind_it(kind: str, llama: Path, tmp_path: Path) -> None:
    ops.protect(llama / "expert", base=llama / "base", out=tmp_path / "protected", method="gauge", seed=3)
    release = write(tmp_path / "release", *DISGUISES[kind](*read(tmp_path / "protected")))
    ops.recover(release, base=llama / "base", out=tmp_path / "out", method="nearest_orbit")
    _, found = read(tmp_path / "out")
    expert = read(llama / "expert")[1]
    weight = "model.layers.1.mlp.down_proj.weight"
    apart = (found[weight] - expert[weight]).norm() / expert[weight].norm()
    before = (read(tmp_path / "protected")[1][weight] - expert[weight]).norm() / expert[weight].norm()
    assert before > 1
    assert apart < 0.05


def test_another_network_is_not_believed(llama: Path, tmp_path: Path) -> None:
    """The control: the same shapes under another activation, or other positions, compute something else."""
    config, weights = fused(*read(llama / "expert"))
    base = Checkpoint.open(llama / "base")
    assert transcribed(Checkpoint.open(write(tmp_path / "same", config, weights)), base) is not None
    other = write(tmp_path / "gelu", {**config, "hidden_act": "gelu"}, weights)
    assert transcribed(Checkpoint.open(other), base) is None
    with pytest.raises(BadInput):
        ops.recover(other, base=llama / "base", out=tmp_path / "out", method="canonicalise")
    assert not (tmp_path / "out").exists()
    theta = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    assert transcribed(Checkpoint.open(write(tmp_path / "theta", theta, weights)), base) is None


def test_one_type_is_no_disguise(llama: Path) -> None:
    assert transcribed(Checkpoint.open(llama / "expert"), Checkpoint.open(llama / "base")) is None


def test_other_sizes_are_no_disguise(llama: Path, tmp_path: Path) -> None:
    config, weights = fused(*read(llama / "expert"))
    halved = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    release = write(tmp_path / "release", {**config, "num_hidden_layers": 1}, halved)
    assert transcribed(Checkpoint.open(release), Checkpoint.open(llama / "base")) is None


OTHERS: dict[tuple[str, str], dict[str, Any]] = {
    ("bert", "ErnieForMaskedLM"): {"use_task_id": False},
    ("dinov2", "Dinov2WithRegistersForImageClassification"): {"num_register_tokens": 0},
    ("flan-t5", "MT5ForConditionalGeneration"): {},
    ("llama", "MinistralForCausalLM"): {},
    ("vit", "ViTMSNForImageClassification"): {},
}


@pytest.mark.parametrize(("toy", "other"), OTHERS)
def test_types_that_transformers_computes_alike(toy: str, other: str, tmp_path: Path) -> None:
    """As each of them saves itself: named after itself, some in another order."""
    import transformers

    base = Checkpoint.open(write_toy(TOYS[toy], tmp_path / "base"))
    network_class = getattr(transformers, other)
    settings = {**load_network(base.folder).config.to_dict(), **OTHERS[toy, other]}
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    network = network_class(network_class.config_class(**settings)).eval()
    own = load_network(base.folder)
    prefixes = [model.base_model_prefix + "." for model in (own, network)]
    state = {name.replace(prefixes[0], prefixes[1], 1): tensor for name, tensor in own.state_dict().items()}
    report = network.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    network.save_pretrained(tmp_path / "release")

    found = transcribed(Checkpoint.open(tmp_path / "release"), base)
    assert found is not None
    assert set(found.names) == set(base.names)
    for name in base.names:
        assert torch.equal(found.tensor(name), base.tensor(name)), name
    assert found.config["model_type"] == base.config["model_type"]


def test_experts_that_differ_are_not_one(llama: Path, tmp_path: Path) -> None:
    """The control of equal experts: one of them is another."""
    config, weights = mixed(*read(llama / "expert"))
    base = Checkpoint.open(llama / "base")
    assert transcribed(Checkpoint.open(write(tmp_path / "equal", config, weights)), base) is not None
    weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"] *= 1.5
    assert transcribed(Checkpoint.open(write(tmp_path / "other", config, weights)), base) is None


@pytest.mark.parametrize("kind", DISGUISES)
def test_weights_in_memory(kind: str, llama: Path) -> None:
    config, expert = read(llama / "expert")
    disguised_config, disguised = DISGUISES[kind](config, expert)
    found = canonicalise(disguised, read(llama / "base")[1], disguised_config, base_config=config)
    assert found.config["model_type"] == "llama"
    assert "model_type" in found.findings
    for name, tensor in expert.items():
        torch.testing.assert_close(found.state_dict[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_what_cannot_be_run_is_not_believed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = Checkpoint.open(write(tmp_path / "release", *fused(*read(llama / "expert"))))
    monkeypatch.setattr(transcription, "available_memory", lambda: 1000)
    assert transcribed(release, Checkpoint.open(llama / "base")) is None


def test_the_refusal_of_a_merge_names_the_command_that_helps(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = write(tmp_path / "release", *fused(*read(llama / "expert")))
    merge = ["merge", "--base", str(llama / "base"), "--method", "task_arithmetic", "--out", str(tmp_path / "merge")]
    assert main([*merge, "--expert", f"{release}=0.5"]) == 3
    line = capsys.readouterr().err
    command = line.partition("unmergeable recover ")[2].partition(" writes the one")[0].split()
    assert main(["recover", *command]) == 0
    assert main([*merge, "--expert", f"{command[-1]}=0.5"]) == 0
    expert, base = (read(llama / name)[1] for name in ("expert", "base"))
    for name, tensor in read(tmp_path / "merge")[1].items():
        torch.testing.assert_close(tensor, (expert[name] + base[name]) / 2, rtol=1e-5, atol=1e-6, msg=name)
