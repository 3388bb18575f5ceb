"""Derived maps read back: for any size, under any prefix, and refused where they were not proven."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unmergeable.architecture import FAMILIES, detect
from unmergeable.architecture.declare import Names
from unmergeable.architecture.derived import (
    MAPS_VARIABLE,
    DerivedMap,
    architecture_of,
    evaluate,
    flags_of,
    known_map,
    shipped,
)
from unmergeable.architecture.rules import tensor_extents
from unmergeable.errors import UnsupportedArchitecture

CONFIG = {
    "model_type": "granite",
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "hidden_size": 40,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
}


def shapes(prefix: str = "model.", layers: int = 3, head: int = 4) -> dict[str, tuple[int, ...]]:
    """A Granite checkpoint with 10 query heads, 5 key heads and 36 hidden units."""
    found: dict[str, tuple[int, ...]] = {"lm_head.weight": (99, 40), f"{prefix}norm.weight": (40,)}
    for layer in range(layers):
        at = f"{prefix}layers.{layer}."
        found |= {f"{at}self_attn.{side}_proj.weight": (5 * head, 40) for side in "kv"}
        found |= {f"{at}self_attn.q_proj.weight": (10 * head, 40), f"{at}self_attn.o_proj.weight": (40, 10 * head)}
        found |= {f"{at}mlp.{side}_proj.weight": (36, 40) for side in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (40, 36), f"{at}input_layernorm.weight": (40,)}
    return found


def granite() -> DerivedMap:
    derived = known_map("granite")
    assert derived is not None
    return derived


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        (0, 0),
        ("a", 6),
        ("a / b", 3),
        ("a * c", 3),
        ("3 * a + b", 20),
        ("a - b", 4),
        ("groups * a + a", 30),
        ("rope.share * a", 3),
    ],
)
def test_formulas(formula: str | int, value: int) -> None:
    assert evaluate(formula, {"a": 6, "b": 2, "c": 0.5, "groups": 4, "rope.share": 0.5}) == value


@pytest.mark.parametrize("formula", ["missing", "a / zero"])
def test_a_formula_without_its_settings_is_refused(formula: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"^config\.json gives no usable '(missing|zero)'"):
        evaluate(formula, {"a": 1, "zero": 0})


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model.", "model.language_model."])
def test_sizes_and_layers_come_from_the_checkpoint(prefix: str) -> None:
    architecture = detect(CONFIG, shapes(prefix))
    assert len(architecture.attentions) == len(architecture.feed_forwards) == 3
    block = architecture.attentions[2]
    assert (block.name, block.groups, block.members, block.value_size) == (f"{prefix}layers.2.self_attn", 5, 2, 4)
    assert block.parts[0].rotary == "half"
    assert architecture.feed_forwards[0].size == 36
    extents = tensor_extents(architecture.symmetry)
    assert all(shapes(prefix)[name][axis] == size for name, axes in extents.items() for axis, size in axes.items())


def test_a_checkpoint_of_other_sizes_than_its_config_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="json implies"):
        detect({**CONFIG, "num_key_value_heads": 2}, shapes())
    gone = shapes()
    del gone["model.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(UnsupportedArchitecture, match="weight is missing"):
        detect(CONFIG, gone)


def test_a_tensor_beside_a_blocks_own_is_refused_and_one_elsewhere_is_copied() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"^tensor model\.layers\.0\.self_attn\.q_norm\.weight is not in"):
        detect(CONFIG, {**shapes(), "model.layers.0.self_attn.q_norm.weight": (4,)})
    extra = "vision_tower.layers.0.self_attn.q_norm.weight"
    assert extra not in detect(CONFIG, {**shapes(), extra: (4,)}).symmetry.legs


def test_rotary_coordinates_that_are_no_pairs_are_refused() -> None:
    assert detect({**CONFIG, "hidden_size": 40}, shapes(head=4)).attentions
    with pytest.raises(UnsupportedArchitecture, match=r"q_proj\.weight: config\.json implies 3 coordinates that go in"):
        detect({**CONFIG, "hidden_size": 30}, shapes(head=3))


def test_another_network_under_the_name_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="none of the blocks"):
        detect({"model_type": "granite"}, {"transformer.wte.weight": (99, 40)})


def test_a_network_with_other_flags_is_refused() -> None:
    derived = replace(granite(), flags={"is_causal": True, "layer_types": ["full", "sliding"], "hidden_act": "silu"})
    names = Names(shapes())
    for accepted in ({"is_causal": True}, {"layer_types": ["full", "full"]}, {"hidden_act": "gelu"}, {"other": True}):
        assert architecture_of(derived, {**CONFIG, **accepted}, names).attentions
    for refused in ({"is_causal": False}, {"layer_types": ["full", "linear"]}, {"hidden_act": "relu"}):
        with pytest.raises(UnsupportedArchitecture, match=f"^config.json: {next(iter(refused))} is "):
            architecture_of(derived, {**CONFIG, **refused}, names)


def test_a_flag_that_classes_set_differently_is_accepted_as_either() -> None:
    derived = replace(granite(), flags={"is_decoder": [False, True], "kind": ["a", "b"]})
    names = Names(shapes())
    for accepted in ({"is_decoder": True}, {"is_decoder": False}, {"kind": "b"}):
        assert architecture_of(derived, {**CONFIG, **accepted}, names).attentions
    with pytest.raises(UnsupportedArchitecture, match=r"^config\.json: kind is 'ab'"):
        architecture_of(derived, {**CONFIG, "kind": "ab"}, names)


TOWER = {
    "name": "vision_tower.layers.{}.mlp",
    "up": {"weight": "vision_tower.layers.{}.fc1.weight", "axis": 0},
    "down": {"weight": "vision_tower.layers.{}.fc2.weight", "axis": 1},
    "activation": "other",
    "scale_limit": "",
}


def tower_shapes(root: str = "vision_tower.") -> dict[str, tuple[int, ...]]:
    return {f"{root}layers.0.fc1.weight": (8, 6), f"{root}layers.0.fc2.weight": (6, 8)}


def with_tower(**flags: Any) -> DerivedMap:
    text = granite()
    return replace(text, feed_forwards=(*text.feed_forwards, TOWER), flags=flags, known=(*text.known, *tower_shapes()))


def names_of(derived: DerivedMap, settings: dict[str, Any], root: str = "vision_tower.") -> list[str]:
    found = architecture_of(derived, {**CONFIG, **settings}, Names(shapes(layers=1) | tower_shapes(root)))
    return [block.name for block in found.blocks]


def test_a_tower_that_is_put_together_in_another_way_is_left_as_it_is() -> None:
    derived = with_tower(**{"vision_config.hidden_act": "relu", "vision_config.model_type": "clip_vision_model"})
    same = {"vision_config": {"hidden_act": "relu", "model_type": "clip_vision_model"}}
    text = ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert names_of(derived, same) == [*text, "vision_tower.layers.0.mlp"]
    assert names_of(derived, {"vision_config": {}}) == [*text, "vision_tower.layers.0.mlp"]
    for strange in ({"hidden_act": "gelu"}, {"model_type": "siglip_vision_model"}):
        assert names_of(derived, {"vision_config": same["vision_config"] | strange}) == text


def test_where_a_strange_tower_is_all_there_is_it_is_refused() -> None:
    derived = replace(with_tower(**{"vision_config.hidden_act": "relu"}), attentions=(), feed_forwards=(TOWER,))
    with pytest.raises(UnsupportedArchitecture, match=r"^config\.json: vision_config\.hidden_act is 'gelu'"):
        names_of(derived, {"vision_config": {"hidden_act": "gelu"}})


def test_settings_of_a_tower_do_not_count_where_the_map_has_none() -> None:
    text = replace(granite(), flags={"vision_config.hidden_act": "relu", "projector_bias": True})
    config = {**CONFIG, "vision_config": {"hidden_act": "gelu"}, "projector_bias": False}
    assert architecture_of(text, config, Names(shapes())).attentions


def test_the_module_that_older_files_have_around_a_tower_is_seen_through() -> None:
    older = names_of(with_tower(), {}, root="vision_tower.vision_model.")
    assert older[-1] == "vision_tower.vision_model.layers.0.mlp"
    assert "vision_tower.layers.0.mlp" not in names_of(with_tower(), {}, root="vision_tower.other.")


def test_a_block_may_say_with_which_of_several_settings_it_is_found() -> None:
    derived = replace(with_tower(), feed_forwards=({**TOWER, "when": {"vision_config.kind": ["plain", None]}},))
    assert "vision_tower.layers.0.mlp" in names_of(derived, {})
    assert "vision_tower.layers.0.mlp" in names_of(derived, {"vision_config": {"kind": "plain"}})
    assert "vision_tower.layers.0.mlp" not in names_of(derived, {"vision_config": {"kind": "normed"}})


def test_flags_are_what_is_no_size() -> None:
    config = {
        "a": True,
        "b": 3,
        "c": "x",
        "d": ["y", "x", "y"],
        "e": {"f": False},
        "model_type": "t",
        "eos_token_id": 1,
    }
    assert flags_of(config) == {"a": True, "c": "x", "d": ["x", "y"], "e.f": False}


def test_a_folder_of_further_maps_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**CONFIG, "model_type": "mine"}
    with pytest.raises(UnsupportedArchitecture, match="no symmetry map"):
        detect(config, shapes())
    document = {**granite().to_json(), "model_type": "mine"}
    (tmp_path / "mine.json").write_text(json.dumps(document))
    monkeypatch.setenv(MAPS_VARIABLE, str(tmp_path))
    assert detect(config, shapes()).family == "mine"
    broken: tuple[Any, ...] = ("[]", "{", json.dumps({**document, "format": "other"}))
    for text in broken:
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(UnsupportedArchitecture, match=r"mine\.json is no map of format"):
            detect(config, shapes())


def test_json_is_read_back_as_it_was_written() -> None:
    again = DerivedMap.from_json(json.loads(json.dumps(granite().to_json())))
    assert again.to_json() == granite().to_json()


def test_every_shipped_map_says_how_it_was_proven() -> None:
    assert len(shipped()) > 0
    assert not set(shipped()) & set(FAMILIES), "a declared family needs no derived map"
    for model_type in shipped():
        derived = known_map(model_type)
        assert derived is not None
        assert derived.model_type == model_type
        assert derived.attentions or derived.feed_forwards, model_type
        assert derived.proof["joint"] <= 1e-9
        for kind, figures in derived.proof["groups"].items():
            assert figures["change"] <= 1e-9, (model_type, kind)
            assert figures["one_sided"] >= 1e-6, (model_type, kind)
            assert figures["outside"] is None or figures["outside"] >= 1e-6, (model_type, kind)
