"""From a config and shapes to an architecture, or one line that says which tensor or setting does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.architecture import FAMILIES, detect
from unmergeable.architecture.declare import Names, rope_setting, setting
from unmergeable.architecture.families import described
from unmergeable.architecture.symmetry import GroupKind, Role
from unmergeable.errors import UnsupportedArchitecture
from zoo import TOYS

Shapes = dict[str, tuple[int, ...]]
Q, MLP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp"
BODY = ("query_key", "value_output", "heads", "feed_forward", "experts")


def refusal(config: Mapping[str, Any], shapes: Shapes) -> str:
    """The line with which a checkpoint is refused."""
    with pytest.raises(UnsupportedArchitecture) as caught:
        detect(config, shapes)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def without(toy: ToyCheckpoint, *names: str) -> Shapes:
    shapes = toy.shapes
    for name in names:
        del shapes[name]
    return shapes


# ------------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize("name", TOYS)
def test_every_toy_is_recognised_from_config_and_shapes_alone(name: str) -> None:
    toy = toy_checkpoint(name)
    kind = toy.config.get("model_type") or toy.config["_class_name"]
    assert kind in FAMILIES
    assert toy.architecture.family == kind
    assert toy.architecture == detect(dict(toy.config), toy.shapes)
    assert toy.architecture.attentions
    assert toy.architecture.feed_forwards


def test_the_order_of_tensors_does_not_matter() -> None:
    for name in ("deepseek_v3", "unet-sd15"):
        toy = toy_checkpoint(name)
        backwards = detect(toy.config, dict(reversed(toy.shapes.items())))
        assert set(backwards.blocks) == set(toy.architecture.blocks)
        assert backwards.symmetry.spaces == toy.architecture.symmetry.spaces


RENAMED = {
    "llama": ("model.", ""),
    "bert-classification": ("bert.", ""),
    "bert-embedding": ("", "bert."),
    "gpt2": ("transformer.", ""),
    "gpt_neox": ("gpt_neox.", ""),
    "opt": ("model.decoder.", "decoder."),
    "vit": ("vit.", ""),
    "dinov2": ("dinov2.", "backbone."),
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_body_is_found_under_any_of_its_prefixes(name: str) -> None:
    toy, (old, new) = toy_checkpoint(name), RENAMED[name]
    renamed = {new + key.removeprefix(old) if key.startswith(old) else key: shape for key, shape in toy.shapes.items()}
    assert renamed != toy.shapes
    assert len(detect(toy.config, renamed).blocks) == len(toy.architecture.blocks)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama", {"score.weight": (3, 48)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
        ("bert-embedding", {"qa_outputs.weight": (2, 48), "qa_outputs.bias": (2,)}),
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()}),
        ("vit", {"classifier.weight": (9, 48)}),
    ],
)
def test_heads_and_buffers_on_top_are_no_part_of_the_body(name: str, extra: Shapes) -> None:
    toy = toy_checkpoint(name)
    symmetry = detect(toy.config, {**toy.shapes, **extra}).symmetry
    assert not set(extra) & set(symmetry.tensors_of(symmetry.select(*BODY)))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("config", [{"model_type": "mamba"}, {"_class_name": "AutoencoderKL"}, {"model_type": "Llama"}])
def test_an_unknown_family_is_named_beside_the_known_ones(config: dict[str, str]) -> None:
    message = refusal(config, toy_checkpoint("llama").shapes)
    assert message.startswith(f"model type {next(iter(config.values()))}: no symmetry map. Known: ")
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize("config", [{}, {"model_type": ""}, {"model_type": None}])
def test_a_config_without_a_family_says_so(config: dict[str, Any]) -> None:
    assert refusal(config, {}).startswith("model type missing from config.json: no symmetry map.")


@pytest.mark.parametrize("name", TOYS)
def test_a_missing_weight_is_refused_by_name(name: str) -> None:
    toy = toy_checkpoint(name)
    symmetry = toy.architecture.symmetry
    for tensor in symmetry.tensors_of(symmetry.select(*BODY)):
        if tensor.endswith("bias"):
            continue
        # Either it is said to be missing, or what stands beside it has lost its place.
        module = tensor.rsplit(".", 2)[0]
        assert module in refusal(toy.config, without(toy, tensor)), tensor


@pytest.mark.parametrize("name", TOYS)
def test_a_missing_bias_is_no_contradiction(name: str) -> None:
    """Every family has models with and without: what is there is transformed."""
    toy = toy_checkpoint(name)
    norm_biases = {block.norm.query_bias for block in toy.architecture.attentions if block.norm}
    norm_biases |= {block.norm.key_bias for block in toy.architecture.attentions if block.norm}
    for tensor in toy.architecture.symmetry.legs:
        if tensor in norm_biases:
            assert tensor in refusal(toy.config, without(toy, tensor))
        elif tensor.endswith("bias"):
            assert tensor not in detect(toy.config, without(toy, tensor)).symmetry.legs


def test_a_missing_weight_reads_so() -> None:
    toy = toy_checkpoint("llama")
    message = f"tensor {Q} is missing, which a llama model of this config has; is the checkpoint complete?"
    assert refusal(toy.config, without(toy, Q)) == message


def test_a_missing_feed_forward_is_noticed_though_nothing_points_to_it() -> None:
    for name, module in (("llama", MLP), ("qwen3_moe", MLP), ("deepseek_v3", MLP), ("gpt2", "transformer.h.1.mlp")):
        toy = toy_checkpoint(name)
        gone = [tensor for tensor in toy.tensors if tensor.startswith(module + ".")]
        assert len(gone) > 1
        assert f"tensor {module}." in refusal(toy.config, without(toy, *gone))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_a_missing_expert_is_noticed_wherever_it_stands(name: str) -> None:
    toy = toy_checkpoint(name)
    module = next(block.name for block in toy.architecture.feed_forwards if block.name.endswith("experts.0"))
    for expert in range(4):
        path = module.removesuffix("0") + str(expert)
        gone = [tensor for tensor in toy.tensors if tensor.startswith(path + ".")]
        assert len(gone) == 3
        assert f"tensor {path}." in refusal(toy.config, without(toy, *gone))
    every = [tensor for tensor in toy.tensors if tensor.startswith(module.removesuffix("0"))]
    assert f"tensor {module}." in refusal(toy.config, without(toy, *every))
    counted = next(key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in toy.config)
    router = module.removesuffix("experts.0") + "gate.weight"
    assert f"tensor {router}" in refusal({**toy.config, counted: 3}, toy.shapes)
    silent = {key: value for key, value in toy.config.items() if key != counted}
    assert detect(silent, toy.shapes) == toy.architecture  # as many as are stored


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.layers.2.self_attn.q_proj.weight"),
        ("llama", "model.layers.0.mlp.gate.weight"),
        ("llama", "vision_tower.layers.0.weight"),
        ("bert", "bert.encoder.layer.0.crossattention.self.query.weight"),
        ("gpt2", "transformer.h.0.crossattention.c_attn.weight"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.adapter.weight"),
        ("stablelm", "model.layers.0.self_attn.q_layernorm.norms.0.weight"),
        ("unet-sd15", "down_blocks.0.motion_modules.0.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.4.w1.weight"),
    ],
)
def test_a_tensor_that_no_map_claims_is_refused_by_name(name: str, tensor: str) -> None:
    toy = toy_checkpoint(name)
    message = refusal(toy.config, {**toy.shapes, tensor: (48, 48)})
    assert message.startswith(f"tensor {tensor} has no place in the symmetry map of {toy.architecture.family};")


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("change", [1, -1])
def test_a_tensor_of_another_shape_is_refused(name: str, change: int) -> None:
    toy = toy_checkpoint(name)
    for tensor, legs in toy.architecture.symmetry.legs.items():
        shape = list(toy.shapes[tensor])
        shape[legs[0].axis] += change
        message = refusal(toy.config, {**toy.shapes, tensor: tuple(shape)})
        assert "tensor " in message, message
        if "attn" in tensor and not tensor.startswith("down_blocks"):
            assert message.startswith(f"tensor {tensor} has shape {shape}, but config.json implies "), message


def test_a_tensor_with_too_few_axes_is_refused() -> None:
    toy = toy_checkpoint("llama")
    for shape in ((), (48,)):
        message = refusal(toy.config, {**toy.shapes, "model.layers.1.self_attn.o_proj.weight": shape})
        assert message.startswith(f"tensor model.layers.1.self_attn.o_proj.weight has shape {list(shape)}")
    refusal(toy.config, {**toy.shapes, f"{MLP}.up_proj.weight": ()})


REQUIRED = {
    "llama": "num_attention_heads",
    "gpt2": "n_head",
    "gptj": "n_embd",
    "gpt_neox": "hidden_size",
    "bloom": "n_layer",
    "falcon-40b-like": "num_attention_heads",
    "deepseek_v3": "kv_lora_rank",
    "phi3": "intermediate_size",
    "unet-sd15": "block_out_channels",
}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_setting_is_refused_by_name(name: str) -> None:
    toy, key = toy_checkpoint(name), REQUIRED[name]
    for config in ({other: value for other, value in toy.config.items() if other != key}, {**toy.config, key: None}):
        message = refusal(config, toy.shapes)
        assert re.fullmatch(rf"config\.json has no ('\w+' or )?'{key}'( or '\w+')*; add it\.", message), message


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", ["many", "", [6], {"a": 1}, 0, -3, 7, 1.5, float("nan"), float("inf"), 10**30])
def test_a_setting_that_makes_no_sense_is_refused(key: str, value: Any) -> None:
    toy = toy_checkpoint("llama")
    config = {name: other for name, other in toy.config.items() if name != "head_dim"}
    message = refusal({**config, key: value}, toy.shapes)
    assert "config" in message or "tensor" in message


def test_more_layers_than_stored_are_refused() -> None:
    toy = toy_checkpoint("llama")
    message = refusal({**toy.config, "num_hidden_layers": 3}, toy.shapes)
    assert message.startswith("tensor model.layers.2.self_attn.q_proj.weight is missing")
    fewer = refusal({**toy.config, "num_hidden_layers": 1}, toy.shapes)
    assert fewer.startswith("tensor model.layers.1.")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("mixtral", "num_local_experts"),
        ("stablelm", "num_attention_heads"),
    ],
)
@pytest.mark.parametrize("count", [10**12, 1e12, "1000000000000"])
def test_counts_that_would_fill_the_memory_are_refused_at_once(name: str, key: str, count: Any) -> None:
    toy = toy_checkpoint(name)
    assert refusal({**toy.config, key: count}, toy.shapes).startswith(f"config.json: {key} is 1,000,000,000,000,")
    assert len(refusal({**toy.config, key: "9" * 4000}, toy.shapes)) < 500


def test_another_network_under_the_name_is_refused() -> None:
    for kind, other in (("gpt2", "llama"), ("llama", "gpt2"), ("t5", "bert"), ("UNet2DConditionModel", "vit")):
        toy = toy_checkpoint(other)
        config = {**toy_checkpoint({"UNet2DConditionModel": "unet-sd15"}.get(kind, kind)).config}
        refusal(config, toy.shapes)
        refusal(config, {})


@pytest.mark.parametrize("factor", [0.3, 1.5, -0.5, "half"])
def test_rotary_coordinates_come_in_pairs_within_the_head(factor: Any) -> None:
    """0.3 of a head of 8 is 2.4 coordinates: 2 of them make a pair, but of 10 they would be 3."""
    toy = toy_checkpoint("stablelm")
    config = {**toy.config, "rope_parameters": {"partial_rotary_factor": factor}}
    if factor == 0.3:
        assert detect(config, toy.shapes).attentions[0].parts[0].size == 2
        config = {**config, "rope_parameters": {"partial_rotary_factor": 0.4}}
    refusal(config, toy.shapes)


# ---------------------------------------------------------------------------------------------- the words of tables


def test_settings_are_found_under_older_names() -> None:
    assert setting({"b": 2}, "a", "b") == 2
    assert setting({"a": None, "b": 0}, "a", "b") == 0  # null is not set; zero is
    assert setting({}, "a", default=None) is None
    with pytest.raises(UnsupportedArchitecture, match=r"^config\.json has no 'a' or 'b'; add it\.$"):
        setting({}, "a", "b")


def test_rotary_settings_are_found_old_and_new() -> None:
    assert rope_setting({"rope_parameters": {"k": 1}, "k": 2}, "k", 3) == 1
    assert rope_setting({"rope_scaling": {"k": 1}}, "k", 3) == 1
    for absent in ({}, {"rope_parameters": None}, {"rope_scaling": {"type": "yarn"}}, {"rope_scaling": "linear"}):
        assert rope_setting({**absent, "k": 2}, "k", 3) == 2
        assert rope_setting(absent, "k", 3) == 3


def test_the_first_prefix_that_fits_is_taken() -> None:
    names = Names({"b.x": (1,), "c.x": (1,)})
    assert names.prefix("x", ("a.", "b.", "c.")) == "b."
    assert "b.x" in names
    assert names.optional("b.x") == "b.x"
    assert names.optional("x") is None
    with pytest.raises(UnsupportedArchitecture, match=r"none of the tensors 'x', 'a\.x' is in the checkpoint"):
        names.prefix("x", ("", "a."))


# ----------------------------------------------------------------------------------------- what `methods` tells


def kinds_of(toy: ToyCheckpoint, role: Role) -> set[GroupKind]:
    return {space.group.kind for space in toy.architecture.symmetry.select(role, folding=True).values()}


@pytest.mark.parametrize("name", TOYS)
def test_a_family_leaves_the_groups_it_is_registered_with(name: str) -> None:
    toy = toy_checkpoint(name)
    family = FAMILIES[toy.architecture.family]
    assert kinds_of(toy, "query_key") in [set(kinds) for kinds in family.query_key]
    assert kinds_of(toy, "residual") in [set(kinds) for kinds in family.residual]


def test_a_family_is_registered_with_no_group_between_queries_and_keys_that_none_of_its_models_has() -> None:
    shown: dict[str, list[set[GroupKind]]] = {}
    for name in TOYS:
        toy = toy_checkpoint(name)
        shown.setdefault(toy.architecture.family, []).append(kinds_of(toy, "query_key"))
    for family, seen in shown.items():
        assert all(set(kinds) in seen for kinds in FAMILIES[family].query_key), family


def test_every_family_is_described_in_one_line() -> None:
    for family in FAMILIES:
        for text in (described(family).query_key, described(family).residual):
            assert text
            assert "\n" not in text
            assert not text.endswith(".")


def test_values_are_free_in_every_family() -> None:
    for name in TOYS:
        assert kinds_of(toy_checkpoint(name), "value_output") == {"general_linear"}


BESIDE: dict[str, tuple[str, Shapes]] = {
    "layers that predict further tokens": ("deepseek_v3", {"model.layers.2.eh_proj.weight": (48, 96)}),
    "the value head of reinforcement learning": (
        "llama",
        {"v_head.summary.weight": (1, 48), "v_head.summary.bias": (1,)},
    ),
}


@pytest.mark.parametrize(("family", "more"), BESIDE.values(), ids=BESIDE)
def test_what_is_trained_beside_the_network_is_carried_and_its_stream_left_alone(family: str, more: Shapes) -> None:
    """It reads the stream; layers inside keep their symmetries."""
    toy = toy_checkpoint(family)
    alone = detect(toy.config, toy.shapes)
    beside = detect(toy.config, toy.shapes | more)
    assert alone.symmetry.select("residual", folding=True)
    assert not beside.symmetry.select("residual", folding=True)
    assert next(iter(more)) in beside.missing["residual"]
    assert beside.symmetry.select(*BODY).keys() == alone.symmetry.select(*BODY).keys()
    assert not set(more) & set(beside.symmetry.legs)


def test_layers_that_the_config_counts_are_no_extra_ones() -> None:
    toy = toy_checkpoint("deepseek_v3")
    assert "has no place" in refusal(toy.config, toy.shapes | {"model.layers.1.eh_proj.weight": (48, 96)})
