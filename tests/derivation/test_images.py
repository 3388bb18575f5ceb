"""Networks that read images with text: the inputs run their towers, and a tower's numbers are its own settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from unmergeable.architecture.derived import DerivedMap, known_map, shipped
from unmergeable.architecture.parts import part_of
from unmergeable.derivation.build import Specimen, build, class_named, registered, varied
from unmergeable.derivation.double import in_float64
from unmergeable.derivation.model_types import built, confirm, usual_config
from unmergeable.derivation.scene import layer_of
from unmergeable.derivation.shrink import OTHER, SMALL, UNSEEN, Sizes, shrunken
from unmergeable.errors import UnsupportedArchitecture


def specimen(kind: str) -> Specimen:
    network_class = class_named(registered("image-text")[kind])
    return built(usual_config(kind, network_class), network_class, SMALL)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("llava", 16),  # 4 by 4 patches
        ("gemma3", 4),  # pooled by two in either direction
        ("qwen2_5_vl", 4),  # merged by two in either direction
        ("idefics3", 4),
        ("mistral3", 4),
    ],
)
def test_as_many_placeholders_as_the_tower_makes_vectors(kind: str, tokens: int) -> None:
    small = specimen(kind)
    place = small.config.get("image_token_id", small.config.get("image_token_index"))
    is_image = small.inputs["input_ids"] == place
    assert int(is_image.sum()) == tokens
    if "mm_token_type_ids" in small.inputs:
        assert torch.equal(small.inputs["mm_token_type_ids"], is_image.long())
    with torch.no_grad():
        before = small.outputs()
        with in_float64():
            other = Specimen(
                small.network, {**small.inputs, "pixel_values": small.inputs["pixel_values"] + 1}, small.config
            )
            assert not torch.equal(other.outputs(), before), "the outputs depend on the image"
            first = int(is_image.int().argmax())
            fewer = {
                name: torch.cat([value[:, :first], value[:, first + 1 :]], dim=1)
                if name in {"input_ids", "mm_token_type_ids", "token_type_ids"}
                else value
                for name, value in small.inputs.items()
            }
            with pytest.raises(ValueError, match="do not match"):  # control: one placeholder fewer is refused
                small.network(**fewer)


def test_a_network_that_attends_to_images_reads_them_without_placeholders() -> None:
    small = specimen("mllama")
    assert {"pixel_values", "aspect_ratio_ids", "cross_attention_mask"} <= set(small.inputs)
    assert small.config["text_config"]["cross_attention_layers"] == [1]


@pytest.mark.parametrize("sizes", [SMALL, OTHER, UNSEEN])
def test_a_tower_has_other_heads_than_the_text_and_is_as_wide(sizes: Sizes) -> None:
    usual = usual_config("llava", class_named("LlavaForConditionalGeneration"))
    small = shrunken(usual, sizes)
    vision, text = small["vision_config"], small["text_config"]
    assert vision["num_attention_heads"] != text["num_attention_heads"]
    assert vision["hidden_size"] == text["hidden_size"]


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl", "mllama"])
def test_the_formulas_of_a_tower_are_in_its_own_settings(kind: str) -> None:
    derived = known_map(kind)
    assert derived is not None
    towers = [
        template for template in derived.attentions if "vision" in template["name"] or "visual" in template["name"]
    ]
    assert towers
    assert all(str(template["groups"]).startswith("vision_config.") for template in towers)
    others = [template for template in derived.attentions if template not in towers]
    assert not any("vision" in f"{template['groups']} {template['members']}" for template in others)


def test_layers_that_are_listed_are_among_those_that_are_kept() -> None:
    usual = usual_config("qwen2_5_vl", class_named("Qwen2_5_VLForConditionalGeneration"))
    vision = shrunken(usual)["vision_config"]
    assert vision["depth"] == 2
    assert vision["fullatt_block_indexes"] == [1], "the first layer has windows, the second has none"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("visual.blocks.0.attn.qkv.weight", "visual.blocks.0"),
        ("model.layers.10.mlp.experts.3.up_proj.weight", "model.layers.10"),
        ("visual.merger.mlp.2.weight", ""),
        ("lm_head.weight", ""),
    ],
)
def test_a_step_of_a_sequence_is_no_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_other_settings_go_into_nested_ones() -> None:
    clip = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
    usual: dict[str, Any] = {"size": 1, "vision_config": clip}
    assert varied(usual, {"vision_config": {"hidden_act": "gelu"}}) == {
        "size": 1,
        "vision_config": clip | {"hidden_act": "gelu"},
    }
    found = varied(usual, {"vision_config": {"model_type": "pixtral"}})["vision_config"]
    assert found["model_type"] == "pixtral"
    assert "rope_parameters" in found
    assert found["hidden_act"] != "quick_gelu"


def test_a_network_whose_towers_differ_has_all_of_them() -> None:
    derived = known_map("llava")
    assert derived is not None
    assert set(derived.flags["vision_config.model_type"]) == {"clip_vision_model", "siglip_vision_model", "pixtral"}
    assert {template["name"] for template in derived.attentions} == {
        "vision_tower.encoder.layers.{}.self_attn",
        "vision_tower.transformer.layers.{}.attention",
        "language_model.model.layers.{}.self_attn",
    }


def foreign(derived: DerivedMap) -> list[str]:
    """Settings of one part in the formulas of another, where that has a config of its own: numbers alike by chance."""
    sections = {name.rpartition(".")[0] for name in derived.flags if "." in name}
    parts = {part_of(section) for section in sections}
    found = []
    for template in derived.attentions:
        weight = template["output"]["weight"]
        words = f"{template['groups']} {template['members']} {template['value_size']}".split()
        for section in (word.rpartition(".")[0] for word in words if "." in word):
            is_own = part_of(section) == part_of(weight) or section.split(".")[0] in weight.split(".")
            found += [] if is_own or part_of(weight) not in parts else [f"{template['name']}: {section}"]
    return found


@pytest.mark.parametrize("kind", shipped())
def test_no_formula_is_in_the_settings_of_another_part(kind: str) -> None:
    derived = known_map(kind)
    assert derived is not None
    assert foreign(derived) == []


def test_a_formula_in_the_settings_of_another_part_would_show() -> None:
    derived = known_map("llava")
    assert derived is not None
    mistaken = [{**one, "groups": "text_config.num_attention_heads"} for one in derived.attentions]
    assert foreign(replace(derived, attentions=tuple(mistaken))) != []


def test_an_encoder_with_other_heads_than_its_decoder() -> None:
    network_class = class_named("VisionEncoderDecoderModel")
    small = shrunken(usual_config("vision-encoder-decoder", network_class), UNSEEN)
    small["encoder"]["num_attention_heads"] //= 4
    apart = build(small, network_class)
    derived = known_map("vision-encoder-decoder")
    assert derived is not None
    confirm(derived, apart)
    mistaken = [{**one, "groups": "decoder.num_attention_heads"} for one in derived.attentions]
    with pytest.raises(UnsupportedArchitecture, match="changes outputs"):
        confirm(replace(derived, attentions=tuple(mistaken)), apart)
