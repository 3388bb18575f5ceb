"""A finished map is read back for sizes it was not made from: a formula that fitted by chance is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import transformers

from unmergeable.architecture.blocks import Attention
from unmergeable.architecture.derived import DerivedMap, known_map, shipped
from unmergeable.architecture.rules import symmetry_map
from unmergeable.derivation.__main__ import widest
from unmergeable.derivation.build import Specimen, build, default_config, registered
from unmergeable.derivation.derive import derive
from unmergeable.derivation.model_types import built, confirm, confirmed, other_classes, usual_config, widened
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, Prover
from unmergeable.derivation.shrink import SMALL, UNSEEN, shrunken, supply
from unmergeable.errors import UnsupportedArchitecture


@pytest.fixture(scope="module")
def granite() -> Specimen:
    return build(shrunken(default_config("granite"), UNSEEN), transformers.GraniteForCausalLM)


def changed(**places: Any) -> DerivedMap:
    derived = known_map("granite")
    assert derived is not None
    template = copy.deepcopy(dict(derived.attentions[0]))
    for name, value in places.items():
        template[name] = template[name] | value if isinstance(value, dict) else value
    return replace(derived, attentions=(template,))


def test_the_shipped_map_is_confirmed(granite: Specimen) -> None:
    confirm(changed(), granite)


@pytest.mark.parametrize(
    "mistake",
    [
        {"groups": "num_attention_heads"},
        {"value": {"group_stride": 32}},
        {"value": {"weight": "model.layers.{}.self_attn.k_proj.weight"}},
        {"value_size": "hidden_size / num_attention_heads / 2"},
    ],
)
def test_a_mistake_in_a_formula_is_refused(mistake: dict[str, Any], granite: Specimen) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"^granite: "):
        confirm(changed(**mistake), granite)


def test_a_block_with_a_mistake_is_left_out_and_the_others_stay(granite: Specimen) -> None:
    found = confirmed(changed(value={"group_stride": 32}), granite)
    assert found.attentions == ()
    assert len(found.feed_forwards) == 1
    assert found.reasons["model.layers.{}.self_attn"]


def test_where_queries_and_keys_are_wrong_the_values_stay(granite: Specimen) -> None:
    mistaken = changed()
    (part,) = mistaken.attentions[0]["parts"]
    template = {**mistaken.attentions[0], "parts": [{**part, "rotary": "interleaved"}]}
    found = confirmed(replace(mistaken, attentions=(template,)), granite)
    assert found.attentions[0]["parts"] == []
    assert found.attentions[0]["value"] == template["value"]
    assert "changes outputs" in found.reasons["model.layers.{}.self_attn"]


def test_a_map_of_nothing_but_mistakes_is_refused(granite: Specimen) -> None:
    wrong = changed(value={"weight": "model.layers.{}.self_attn.k_proj.weight"})
    with pytest.raises(UnsupportedArchitecture, match=r"^granite: "):
        confirmed(replace(wrong, feed_forwards=()), granite)


def test_a_class_that_reads_a_setting_its_config_lacks_is_built() -> None:
    kind = transformers.MoonshineStreamingForConditionalGeneration
    specimen = built(usual_config("moonshine_streaming", kind), kind, SMALL)
    assert specimen.config["num_key_value_heads"] in {SMALL.groups, SMALL.heads}
    assert "input_values" in specimen.inputs


def test_only_known_settings_are_supplied() -> None:
    config = transformers.GraniteConfig()
    small = {"model_type": "granite"}
    assert supply(small, AttributeError(name="num_key_value_heads", obj=config), SMALL)
    assert small["num_key_value_heads"] == SMALL.groups  # type: ignore[comparison-overlap]
    assert not supply(small, AttributeError(name="num_key_value_heads", obj=config), SMALL), "it is there by now"
    assert not supply(small, AttributeError(name="no_such_setting", obj=config), SMALL)
    assert not supply(small, ValueError("num_key_value_heads"), SMALL)


def test_inputs_are_what_a_network_reads() -> None:
    def read(name: str, kind: Any) -> Specimen:
        return built(usual_config(name, kind), kind, SMALL)

    sound = read("speech_to_text", transformers.Speech2TextForConditionalGeneration)
    assert sound.inputs["input_features"].shape[-1] == sound.config["input_feat_per_channel"]
    patches = read("siglip2", transformers.Siglip2ForImageClassification)
    assert patches.inputs["pixel_values"].shape[-1] == 3 * patches.config["vision_config"]["patch_size"] ** 2
    coded = read("musicgen", transformers.MusicgenForCausalLM)
    assert len(coded.inputs["input_ids"]) == coded.config["num_codebooks"]


def test_a_map_of_an_encoder_and_decoder_is_proven_on_the_decoder_alone() -> None:
    derived = known_map("pegasus")
    assert derived is not None
    assert len(derived.attentions) == 3
    assert other_classes(derived) == ["PegasusForCausalLM"]
    narrow = replace(derived, flags={**derived.flags, "is_encoder_decoder": True}, proof={})
    alone = built(default_config("pegasus"), transformers.PegasusForCausalLM, UNSEEN)
    with pytest.raises(UnsupportedArchitecture, match="is_encoder_decoder is False"):
        confirm(narrow, alone)
    wide = widened(narrow)
    assert wide.flags["is_encoder_decoder"] == [False, True]
    assert wide.proof["also"] == ["PegasusForCausalLM"]
    confirm(wide, alone)


def test_a_class_on_which_the_map_does_not_hold_widens_nothing() -> None:
    derived = known_map("pegasus")
    assert derived is not None
    mistaken = [
        {**template, "value": {**template["value"], "weight": template["parts"][0]["key"]["weight"]}}
        for template in derived.attentions
    ]
    narrow = replace(derived, attentions=tuple(mistaken), flags={"is_encoder_decoder": True}, proof={})
    assert widened(narrow) == narrow


def test_shipped_maps_of_encoder_decoders_are_of_the_whole() -> None:
    kinds = set(shipped()) & set(registered("seq2seq"))
    assert len(kinds) >= 25
    for kind in kinds:
        derived = known_map(kind)
        assert derived is not None
        assert derived.network_class == registered("seq2seq")[kind] or registered("speech").get(kind), kind


def test_a_narrower_map_replaces_none_of_the_package() -> None:
    derived = known_map("pegasus")
    assert derived is not None
    whole = derived.to_json()
    decoder = {**whole, "attentions": whole["attentions"][:1]}
    assert "pegasus" not in widest({"causal-lm": {"pegasus": decoder}})
    assert widest({"causal-lm": {"pegasus": decoder}, "seq2seq": {"pegasus": whole}}) == {"pegasus": whole}


def test_a_norm_before_positions_on_a_part_of_each_head_is_found() -> None:
    """Quarter turns and signs for each head, where a proposal of another norm would leave one sign."""
    kind = transformers.Qwen3_5ForCausalLM
    found = derive(built(usual_config("qwen3_5_text", kind), kind, SMALL)).blocks
    (block,) = (one for one in found if isinstance(one, Attention))
    assert block.norm is not None
    assert (block.norm.kind, block.norm.scope, block.norm.offset) == ("rms", "head", 1.0)
    assert [(part.size, part.rotary) for part in block.parts] == [(4, "half"), (12, None)]


@pytest.mark.parametrize("kind", ["PixArtTransformer2DModel", "DiTTransformer2DModel"])
def test_small_images_have_more_than_one_token(kind: str) -> None:
    """Of a single token the attention is no choice, and nothing shows what its queries and keys let through."""
    small = shrunken(default_config(kind))
    assert (small["sample_size"] // small["patch_size"]) ** 2 > 1
    derived = known_map(kind)
    assert derived is not None
    assert all(template["parts"] for template in derived.attentions)


@pytest.mark.parametrize(
    "kind",
    [
        "persimmon",
        "fuyu",
        "esmc",
        "moonshine",
        *(f"{name}Transformer3DModel" for name in ("CogVideoX", "LTXVideo", "Wan")),
    ],
)
def test_queries_and_keys_are_in_the_table(kind: str) -> None:
    """A LayerNorm with biases, one over all heads, a share of each head rotated, a norm in cross-attention."""
    derived = known_map(kind)
    assert derived is not None
    assert all(template["parts"] for template in derived.attentions)


def test_a_norm_over_all_heads_ties_their_signs() -> None:
    """Its mean runs over all of them: a sign for each head, as behind a norm per head, changes the function."""
    small = built(usual_config("esmc", transformers.EsmcForMaskedLM), transformers.EsmcForMaskedLM, SMALL)
    block = next(one for one in derive(small).blocks if isinstance(one, Attention))
    assert block.norm is not None
    assert (block.norm.kind, block.norm.scope) == ("layer", "full")
    prover = Prover(small, Disk(small.network))
    wide, narrow = (symmetry_map([replace(block, norm=replace(block.norm, scope=scope))]) for scope in ("full", "head"))
    name = f"{block.name}.query_key_sign"
    assert (wide.spaces[name].blocks, narrow.spaces[name].blocks) == (1, block.groups)
    assert prover.prove(wide, wide.spaces[name]).holds
    assert prover.prove(narrow, narrow.spaces[name]).change > TOLERANCE
