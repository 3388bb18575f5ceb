"""Recoveries through files: what is written, what is said about it, and what `auto` chooses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmergeable
from low_rank_folder import write_adapter
from unmergeable.architecture.symmetry import Role
from unmergeable.checkpoint import hub
from unmergeable.errors import Mismatch, UnsupportedArchitecture, UsageError
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.gauge import sampled_gauge
from unmergeable.ops.opened import open_with_architecture
from unmergeable.randomness import Stream
from zoo import TOYS, write_toy

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(TOYS["llama"], tmp_path_factory.mktemp("models") / "base")


def tensors_in(folder: Path) -> Tensors:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def write(base: Path, folder: Path, tensors: Tensors) -> Path:
    shutil.copytree(base, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tuned(base: Path, seed: int, share: float = 0.05) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors_in(base).items()}
    return {
        name: tensor + noise[name] * (share * tensor.norm() / noise[name].norm())
        for name, tensor in tensors_in(base).items()
    }


def distance(found: Path, expected: Tensors, base: Path) -> float:
    """Relative to the expected task vector."""
    ours, origin = tensors_in(found), tensors_in(base)
    away = sum(float((ours[name] - tensor).double().square().sum()) for name, tensor in expected.items())
    norm = sum(float((origin[name] - tensor).double().square().sum()) for name, tensor in expected.items())
    return (away / norm) ** 0.5


@pytest.fixture
def hidden(base: Path, tmp_path: Path) -> Path:
    """A fine-tune with heads, hidden units and every basis changed."""
    _, architecture = open_with_architecture(base)
    roles: tuple[Role, ...] = ("query_key", "value_output", "heads", "feed_forward")
    key = sampled_gauge(architecture.symmetry.select(*roles), Stream.from_seed(4), 4.0)
    return write(base, tmp_path / "hidden", transform_all(tuned(base, 1), architecture.symmetry, [key]))


@pytest.mark.parametrize("method", ["nearest_orbit", "auto"])
def test_undoes_every_basis_and_order(method: str, hidden: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovered"
    result = unmergeable.recover(hidden, base=base, method=method, out=out)

    assert (result.method, result.is_exact) == ("nearest_orbit", True)
    assert result.distance_before > 1
    assert result.distance_after <= 0.05
    assert unmergeable.verify(hidden, out).is_equal
    # The fitted numbers take a part of the task vector with them; what is left is the fine-tune.
    assert distance(out, tuned(base, 1), base) < 0.3
    assert distance(hidden, tuned(base, 1), base) > 10
    parts = json.loads(json.dumps(result.to_json()))["parts"]
    assert {part["part"] for part in parts} == {"query_key", "value_output", "feed_forward"}
    assert min(part["order_margin"] for part in parts) > 0.5


@pytest.mark.parametrize(("name", "settings"), [("llama", {}), ("gemma", {"untie": "true"}), ("gpt2", {})])
def test_undoes_the_largest_gauge(name: str, settings: dict[str, str], tmp_path: Path) -> None:
    base = write_toy(TOYS[name], tmp_path / "base")
    expert = write(base, tmp_path / "expert", tuned(base, 1))
    protected, out = tmp_path / "protected", tmp_path / "out"
    unmergeable.protect(expert, base=base, method="gauge", settings=settings, out=protected, key=tmp_path / "key")
    seen = unmergeable.inspect(protected, base=base).comparison
    result = unmergeable.recover(protected, base=base, method="nearest_orbit", out=out)

    assert {"gauge", "permutation"} <= {sign.name for sign in seen.signs}
    assert any("residual stream" in sign.evidence for sign in seen.signs)
    assert result.distance_before > 1
    assert result.distance_after <= 1.04 * 0.05
    assert unmergeable.verify(protected, out).is_equal
    assert distance(protected, tuned(base, 1), base) > 10
    assert distance(out, tuned(base, 1), base) < 0.8


def test_the_published_attack_undoes_params_in_two_steps(base: Path, tmp_path: Path) -> None:
    expert = write(base, tmp_path / "expert", tuned(base, 1))
    protected, matched, both, at_once = (tmp_path / name for name in ("protected", "matched", "both", "at_once"))
    unmergeable.protect(expert, base=base, method="params", out=protected, key=tmp_path / "key")
    unmergeable.recover(protected, base=base, method="neuron_matching", out=matched)
    unmergeable.recover(matched, base=base, method="diagonal_ratio", out=both)
    unmergeable.recover(protected, base=base, method="auto", out=at_once)

    feed_forward = {name: tensor for name, tensor in tuned(base, 1).items() if ".mlp." in name}
    assert distance(protected, feed_forward, base) > 10
    assert distance(matched, feed_forward, base) == 0  # a permutation, undone
    assert distance(matched, tuned(base, 1), base) > 1
    assert distance(both, tuned(base, 1), base) < 0.2
    assert distance(at_once, tuned(base, 1), base) < 0.3
    assert {sign.name for sign in unmergeable.inspect(protected, base=base).comparison.signs} == {
        "scaling",
        "permutation",
    }


def test_moves_experts_between_names(tmp_path: Path) -> None:
    base = write_toy(TOYS["mixtral"], tmp_path / "base")
    _, architecture = open_with_architecture(base)
    key = sampled_gauge(architecture.symmetry.select("experts", "feed_forward"), Stream.from_seed(4), 4.0)
    expert = tuned(base, 1, share=0.01)
    hidden = write(base, tmp_path / "hidden", transform_all(expert, architecture.symmetry, [key]))
    result = unmergeable.recover(hidden, base=base, method="nearest_orbit", out=tmp_path / "out")

    assert result.distance_after <= 0.01
    routers = [name for name in expert if name.endswith("block_sparse_moe.gate.weight")]
    found, moved = tensors_in(tmp_path / "out"), tensors_in(hidden)
    assert all(torch.equal(found[name], expert[name]) for name in routers)
    assert not any(torch.equal(moved[name], expert[name]) for name in routers)


def test_takes_siblings_out(base: Path, tmp_path: Path) -> None:
    expert, sibling = tuned(base, 1), tuned(base, 2)
    source = write(base, tmp_path / "sibling", sibling)
    mixed = {name: 0.7 * expert[name] + 0.3 * tensor for name, tensor in sibling.items()}
    protected = write(base, tmp_path / "mixed", mixed)
    result = unmergeable.recover(protected, base=base, method="auto", sources=[source], out=tmp_path / "out")

    assert (result.method, result.is_exact, result.confidence) == ("source_subtraction", False, None)
    assert result.findings[f"coefficient of {source}"] == pytest.approx(0.3, abs=0.02)
    assert distance(tmp_path / "out", expert, base) < 0.05
    inputs = json.loads((tmp_path / "out" / "unmergeable.json").read_text())["inputs"]
    assert {"source", "base", "source 1"} <= set(inputs)


def test_undoes_a_shrink(base: Path, tmp_path: Path) -> None:
    expert = tuned(base, 1)
    protected = write(base, tmp_path / "shrunk", {name: 0.9 * tensor for name, tensor in expert.items()})
    result = unmergeable.recover(protected, base=base, method="auto", out=tmp_path / "out")

    assert result.method == "task_vector_rescale"
    assert result.findings["mean_shrink"] == pytest.approx(0.1, abs=0.01)
    matrices = {name: tensor for name, tensor in expert.items() if tensor.dim() >= 2}
    assert distance(tmp_path / "out", matrices, base) < 0.05


def test_puts_the_base_where_the_structure_changed(base: Path, tmp_path: Path) -> None:
    expert = tuned(base, 1)
    changed = {name: tensor for name, tensor in expert.items() if "down_proj" not in name}
    changed |= {f"model.layers.{layer}.mlp.coefficients": torch.zeros(3, 48, 80) for layer in range(2)}
    protected = write(base, tmp_path / "polynomial", changed)
    config = json.loads((protected / "config.json").read_text())
    (protected / "config.json").write_text(json.dumps({**config, "model_type": "polynomial_llama"}))

    seen = unmergeable.inspect(protected, base=base)
    result = unmergeable.recover(protected, base=base, method="auto", out=tmp_path / "out")

    assert (seen.model_type, seen.groups) == ("polynomial_llama", {})
    assert seen.verdict == "it looks protected (polynomial FFN); `recover --method revert_to_base` undoes it."
    assert result.method == "revert_to_base"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    found, origin = tensors_in(tmp_path / "out"), tensors_in(base)
    assert all(torch.equal(found[name], origin[name] if "down_proj" in name else expert[name]) for name in origin)
    with pytest.raises(UnsupportedArchitecture, match="polynomial_llama"):
        unmergeable.inspect(protected)
    with pytest.raises(UnsupportedArchitecture, match="polynomial_llama"):
        unmergeable.recover(protected, base=base, method="nearest_orbit", out=tmp_path / "no")


def in_other_words(kind: str, folder: Path, *, factor: float = 1.0) -> None:
    """The release in ``folder`` said otherwise. With ``factor`` other than 1 its biases do add something."""
    config, tensors = json.loads((folder / "config.json").read_text()), tensors_in(folder)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    generator = torch.Generator().manual_seed(9)
    for layer in range(config["num_hidden_layers"]):
        attention, feed_forward = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        if kind in ("qwen2", "attention_bias"):
            for name, width in (("q", heads * size), ("k", groups * size), ("v", groups * size)):
                tensors[f"{attention}.{name}_proj.bias"] = torch.zeros(width)
        if kind == "attention_bias":
            values = torch.randn(groups, size, generator=generator)
            tensors[f"{attention}.v_proj.bias"] = values.flatten()
            of_heads = values.repeat_interleave(heads // groups, 0).flatten()
            tensors[f"{attention}.o_proj.bias"] = -factor * tensors[f"{attention}.o_proj.weight"] @ of_heads
        if kind == "mlp_bias":
            for name, width in (
                ("gate", config["intermediate_size"]),
                ("up", config["intermediate_size"]),
                ("down", size * heads),
            ):
                tensors[f"{feed_forward}.{name}_proj.bias"] = torch.zeros(width) + (factor - 1)
    if kind in ("mistral", "qwen2"):
        config |= {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "sliding_window": None}
    else:
        config |= {kind: True}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", ["nearest_orbit", "auto"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "attention_bias", "mlp_bias"])
def test_a_release_in_other_words_comes_back_in_those_of_its_base(
    kind: str, method: str, hidden: Path, base: Path, tmp_path: Path
) -> None:
    before = logits_of(hidden)
    in_other_words(kind, hidden)
    # What it is called and biases that cancel change nothing but the order of additions in float32.
    assert (logits_of(hidden) - before).abs().max() <= 1e-4 * before.abs().max()
    unmergeable.recover(hidden, base=base, method=method, out=tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert set(tensors_in(tmp_path / "out")) == set(tensors_in(base))
    assert distance(tmp_path / "out", tuned(base, 1), base) < 0.5
    assert (logits_of(tmp_path / "out") - before).abs().max() <= 1e-4 * before.abs().max()


FREQUENCY_RULES = {"reordered": [2, 0, 3, 1], "mirrored": [0, 1, 2, 3], "scaled": [0, 1, 2, 3]}


def with_other_frequencies(kind: str, folder: Path) -> None:
    """The release in ``folder`` with its rotary frequencies said otherwise, four pairs in heads of eight."""
    config, tensors = json.loads((folder / "config.json").read_text()), tensors_in(folder)
    order = torch.tensor(FREQUENCY_RULES[kind])
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0]) if kind == "mirrored" else torch.ones(4)
    factors = (frequencies / (frequencies[order] * signs)).tolist()
    times = 64.0 if kind == "scaled" else 1.0
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors,
        "attention_factor": times, "factor": 1.0, "original_max_position_embeddings": config["max_position_embeddings"],
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        for name, scale in (("q", times**-2), ("k", 1.0)):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            pairs = tensors[key].view(-1, 2, 4, config["hidden_size"])[:, :, order]
            pairs = pairs * torch.stack([torch.ones(4), signs])[None, :, :, None] * scale
            tensors[key] = pairs.reshape(tensors[key].shape).contiguous()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits_of(folder: Path) -> torch.Tensor:
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    logits: torch.Tensor = network(torch.arange(3, 20)[None]).logits.detach()
    return logits


@pytest.mark.parametrize("method", ["nearest_orbit", "auto"])
@pytest.mark.parametrize("kind", FREQUENCY_RULES)
def test_rotary_frequencies_said_otherwise_come_back(
    kind: str, method: str, hidden: Path, base: Path, tmp_path: Path
) -> None:
    before = logits_of(hidden)
    with_other_frequencies(kind, hidden)
    assert (logits_of(hidden) - before).abs().max() <= 1e-4 * before.abs().max()
    found = unmergeable.recover(hidden, base=base, method=method, out=tmp_path / "out").findings

    assert found["frequencies"] == kind
    assert distance(tmp_path / "out", tuned(base, 1), base) < 0.5
    assert (logits_of(tmp_path / "out") - before).abs().max() <= 1e-4 * before.abs().max()
    config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", base))
    assert config["rope_parameters"] == wanted["rope_parameters"]


def test_other_frequencies_are_another_network(hidden: Path, base: Path, tmp_path: Path) -> None:
    """The control: one that is none of the base's is left alone, and the weights with it."""
    with_other_frequencies("reordered", hidden)
    config = json.loads((hidden / "config.json").read_text())
    for kind in ("short_factor", "long_factor"):
        config["rope_parameters"][kind][0] *= 1.01
    (hidden / "config.json").write_text(json.dumps(config))
    result = unmergeable.recover(hidden, base=base, method="nearest_orbit", out=tmp_path / "out")

    assert "frequencies" not in result.findings
    assert distance(tmp_path / "out", tuned(base, 1), base) > 2
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == config["rope_parameters"]


@pytest.mark.parametrize("method", ["nearest_orbit", "auto"])
def test_one_sigmoid_said_as_another_comes_back(method: str, hidden: Path, base: Path, tmp_path: Path) -> None:
    """x sigmoid(1.702 x) is silu(1.702 x) / 1.702."""
    before, tensors = logits_of(hidden), tensors_in(hidden)
    for name in tensors:
        times = 1 / 1.702 if "gate_proj" in name else 1.702 if "up_proj" in name else 1.0
        tensors[name] = tensors[name] * times
    config = json.loads((hidden / "config.json").read_text())
    (hidden / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    save_file(tensors, hidden / "model.safetensors", {"format": "pt"})
    assert (logits_of(hidden) - before).abs().max() <= 1e-4 * before.abs().max()
    unmergeable.recover(hidden, base=base, method=method, out=tmp_path / "out")

    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == "silu"
    assert distance(tmp_path / "out", tuned(base, 1), base) < 0.5
    assert (logits_of(tmp_path / "out") - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize("kind", ["attention_bias", "mlp_bias"])
def test_a_bias_that_adds_something_is_not_left_out(kind: str, hidden: Path, base: Path, tmp_path: Path) -> None:
    in_other_words(kind, hidden, factor=0.5)
    with pytest.raises(Mismatch, match="has no tensor"):
        unmergeable.recover(hidden, base=base, method="nearest_orbit", out=tmp_path / "out")


def test_an_adapter_is_what_it_makes_of_the_base(base: Path, tmp_path: Path) -> None:
    """Recovered from the adapter and from the two merged: the same weights."""
    layer = "model.layers.0.self_attn.q_proj"
    merged = write(base, tmp_path / "merged", tensors_in(base))
    write_adapter(tmp_path / "adapter", base, layer, merged=merged, scale=0.01)
    for name in ("adapter", "merged"):
        unmergeable.recover(tmp_path / name, base=base, method="nearest_orbit", out=tmp_path / f"from-{name}")
    found = [tensors_in(tmp_path / f"from-{name}") for name in ("adapter", "merged")]
    assert all(torch.allclose(found[0][name], tensor, atol=1e-5) for name, tensor in found[1].items())
    assert not torch.allclose(found[0][f"{layer}.weight"], tensors_in(base)[f"{layer}.weight"], atol=1e-3), "control"


def test_auto_does_not_guess(base: Path, tmp_path: Path) -> None:
    expert = tuned(base, 1)
    origin = tensors_in(base)
    plain = write(base, tmp_path / "plain", expert)
    reset = {
        name: torch.where(torch.arange(tensor.numel()).view(tensor.shape) % 8 == 0, origin[name], tensor)
        for name, tensor in expert.items()
    }
    edited = write(base, tmp_path / "reset", reset)

    assert unmergeable.inspect(plain, base=base).comparison.signs == ()
    with pytest.raises(UsageError, match="shows signs of none"):
        unmergeable.recover(plain, base=base, method="auto", out=tmp_path / "out")
    with pytest.raises(UsageError, match="only of reset entries, which none undoes"):
        unmergeable.recover(edited, base=base, method="auto", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_what_a_method_does_not_read(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kabsch reads no sources"):
        unmergeable.recover(base, base=base, method="kabsch", sources=[base], out=tmp_path / "out")
    with pytest.raises(UsageError, match="did you mean 'nearest_orbit'"):
        unmergeable.recover(base, base=base, method="nearest-orbit", out=tmp_path / "out")
    with pytest.raises(UsageError, match="give --base too"):
        unmergeable.inspect(base, sources=[base])


def test_checkpoints_may_be_texts_and_lie_on_the_hub(
    hidden: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"hub:me/release": hidden, "hub:me/base": base}
    monkeypatch.setattr(hub, "download", places.__getitem__)
    options = {"method": "kabsch", "base": "hub:me/base"}
    result = unmergeable.recover("hub:me/release", out=str(tmp_path / "out"), **options)
    unmergeable.recover(hidden, method="kabsch", base=base, out=tmp_path / "other")

    assert result.out == tmp_path / "out"
    assert tensors_in(tmp_path / "out").keys() == tensors_in(tmp_path / "other").keys()
    assert all(torch.equal(t, tensors_in(tmp_path / "other")[name]) for name, t in tensors_in(result.out).items())
    seen = unmergeable.inspect("hub:me/release", base="hub:me/base")
    assert (seen.checkpoint, seen.comparison.folder) == (hidden, base)
    assert seen.to_json() == unmergeable.inspect(str(hidden), base=str(base)).to_json()


def test_an_exact_attack_says_so_for_its_settings(hidden: Path, base: Path, tmp_path: Path) -> None:
    options = {"base": base, "method": "nearest_orbit"}
    exact = unmergeable.recover(hidden, out=tmp_path / "exact", **options)
    nearly = unmergeable.recover(hidden, out=tmp_path / "nearly", settings={"negligible_epsilon": True}, **options)

    assert (exact.is_exact, nearly.is_exact) == (True, False)
    assert "It computes what the protected checkpoint computes" in exact.lines()[-1]
    assert "It does not compute what the protected checkpoint computes" in nearly.lines()[-1]
    assert f"{exact.distance_before:.3g} before, {exact.distance_after:.3g} after" in "\n".join(exact.lines())
