"""From what lies between queries and keys to the group that survives it: one rule per kind of block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from unmergeable.architecture import Architecture
from unmergeable.architecture.blocks import (
    Attention,
    FeedForward,
    Heads,
    Position,
    QueryKeyNorm,
    ScorePart,
    SharedHeads,
)
from unmergeable.architecture.rules import possible_lengths, symmetry_map, tensor_extents
from unmergeable.architecture.symmetry import Pairing, SymmetryMap

GROUPS, MEMBERS, SIZE = 3, 2, 8
QUERY = Heads("q.weight", "q.bias", 0, 0, MEMBERS * SIZE, SIZE)
KEY = Heads("k.weight", "k.bias", 0, 0, SIZE)
VALUE = Heads("v.weight", "v.bias", 0, 0, SIZE)
OUTPUT = Heads("o.weight", None, 1, 0, MEMBERS * SIZE, SIZE)


def attention(
    *,
    rotary: int = 0,
    pairing: Pairing = "half",
    norm: QueryKeyNorm | None = None,
    position: Position = "none",
    heads_limit: str = "",
    name: str = "attn",
) -> Attention:
    parts = [ScorePart(QUERY, KEY, rotary, pairing)] if rotary else []
    if rotary < SIZE:
        rest = (replace(heads, offset=rotary) for heads in (QUERY, KEY))
        parts.append(ScorePart(*rest, SIZE - rotary))
    return Attention(name, GROUPS, MEMBERS, tuple(parts), VALUE, OUTPUT, SIZE, position, norm, heads_limit=heads_limit)


def norm(kind: Any = "rms", scope: Any = "head", **more: Any) -> QueryKeyNorm:
    return QueryKeyNorm(kind, scope, 1e-6, ("qn.weight",), ("kn.weight",), **more)


def groups_of(symmetry: SymmetryMap, role: Any = "query_key", **options: bool) -> dict[str, str]:
    return {name.removeprefix("attn."): str(space.group) for name, space in symmetry.select(role, **options).items()}


def legs_of(symmetry: SymmetryMap, space: str) -> dict[str, str]:
    return {name: leg.variance for name, legs in symmetry.legs.items() for leg in legs if leg.space == space}


# ------------------------------------------------------------------------------------------------- queries and keys


def test_without_positions_any_matrix_survives() -> None:
    symmetry = symmetry_map([attention()])
    assert groups_of(symmetry) == {"query_key": "general_linear"}
    assert legs_of(symmetry, "attn.query_key") == {
        "q.weight": "vector", "q.bias": "vector", "k.weight": "covector", "k.bias": "covector",
    }  # fmt: skip
    space = symmetry.spaces["attn.query_key"]
    assert (space.blocks, space.size, space.limit) == (GROUPS, SIZE, "")
    (query,) = (leg for leg in symmetry.legs["q.weight"] if leg.space == space.name)
    assert (query.block_stride, query.spectators) == (MEMBERS * SIZE, ((MEMBERS, SIZE),))


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotary_positions_leave_complex_numbers(pairing: Pairing) -> None:
    symmetry = symmetry_map([attention(rotary=SIZE, pairing=pairing)])
    assert groups_of(symmetry) == {"query_key": f"rotary({pairing})"}
    assert f"rotary positions ({pairing} pairs)" in symmetry.spaces["attn.query_key"].limit


def test_partial_rotary_positions_leave_any_matrix_on_the_rest() -> None:
    symmetry = symmetry_map([attention(rotary=6)])
    assert groups_of(symmetry) == {"query_key.0": "rotary(half)", "query_key.1": "general_linear"}
    sizes = [symmetry.spaces[f"attn.query_key.{index}"].size for index in range(2)]
    assert sizes == [6, 2]
    offsets = {leg.offset for leg in symmetry.legs["k.weight"] if leg.space == "attn.query_key.1"}
    assert offsets == {6}


def test_a_shared_key_has_one_element_for_all_heads() -> None:
    """The rotary part of multi-head latent attention."""
    part = ScorePart(QUERY, Heads("shared.weight", None, 0, 20, 0), SIZE, "interleaved", shared_key=True)
    symmetry = symmetry_map([replace(attention(), parts=(part,))])
    space = symmetry.spaces["attn.query_key"]
    assert space.blocks == 1
    assert "all query heads share one key" in space.limit
    (query,) = (leg for leg in symmetry.legs["q.weight"] if leg.space == space.name)
    assert query.spectators == ((GROUPS, MEMBERS * SIZE), (MEMBERS, SIZE))
    assert legs_of(symmetry, "attn.heads").keys() == {"q.weight", "q.bias", "v.weight", "v.bias", "o.weight"}


def test_an_rms_norm_per_head_leaves_signs_turns_and_gains() -> None:
    symmetry = symmetry_map([attention(rotary=SIZE, norm=norm(offset=1.0))])
    exact = {
        "query_key_sign": "pair_sign(half)",
        "query_key_turn": "quarter_turn(half)",
        "query_key_gain": "pair_scale(half)",
    }
    assert groups_of(symmetry) == exact
    scales = {"query_key_query_scale": "block_scale", "query_key_key_scale": "block_scale"}
    assert groups_of(symmetry, negligible_epsilon=True) == exact | scales
    assert {space.epsilon for name, space in symmetry.spaces.items() if name.endswith("_scale")} == {1e-6}
    assert legs_of(symmetry, "attn.query_key_gain") == {"qn.weight": "vector", "kn.weight": "covector"}
    assert legs_of(symmetry, "attn.query_key_turn") == {
        "q.weight": "vector", "q.bias": "vector", "k.weight": "vector", "k.bias": "vector",
        "qn.weight": "gain", "kn.weight": "gain",
    }  # fmt: skip
    assert symmetry.gain_offset == {"qn.weight": 1.0, "kn.weight": 1.0}
    assert symmetry.spaces["attn.query_key_query_scale"].blocks == GROUPS * MEMBERS
    assert symmetry.spaces["attn.query_key_key_scale"].blocks == GROUPS


def test_a_layer_norm_per_head_leaves_one_sign_unless_a_bias_follows() -> None:
    plain = symmetry_map([attention(rotary=6, norm=norm("layer"))])
    assert groups_of(plain) == {
        "query_key_sign": "block_sign", "query_key_gain.0": "pair_scale(half)", "query_key_gain.1": "diagonal",
    }  # fmt: skip
    biased = symmetry_map([attention(rotary=6, norm=norm("layer", query_bias="qn.bias", key_bias="kn.bias"))])
    assert groups_of(biased) == {"query_key_gain.0": "pair_scale(half)", "query_key_gain.1": "diagonal"}
    assert legs_of(biased, "attn.query_key_gain.1") == {
        "qn.weight": "vector", "qn.bias": "vector", "kn.weight": "covector", "kn.bias": "covector",
    }  # fmt: skip


def test_a_full_width_norm_leaves_signs_and_gains_per_head() -> None:
    symmetry = symmetry_map([attention(rotary=SIZE, norm=norm("rms", "full"))])
    assert groups_of(symmetry) == {"query_key_sign": "pair_sign(half)", "query_key_gain": "pair_scale(half)"}
    assert symmetry.spaces["attn.query_key_gain"].blocks == GROUPS
    assert symmetry.spaces["attn.query_key_query_scale"].size == GROUPS * MEMBERS * SIZE
    # Gains belong to single heads, so they follow when heads change places; they do not with a norm shared by all.
    assert {"qn.weight", "kn.weight"} <= legs_of(symmetry, "attn.heads").keys()
    assert "qn.weight" not in legs_of(symmetry_map([attention(rotary=SIZE, norm=norm())]), "attn.heads")


# ------------------------------------------------------------------------------------------------ values and heads


@pytest.mark.parametrize("options", [{}, {"rotary": SIZE}, {"rotary": SIZE, "norm": norm()}, {"position": "alibi"}])
def test_values_and_output_leave_any_matrix_whatever_happens_to_scores(options: dict[str, Any]) -> None:
    symmetry = symmetry_map([attention(**options)])
    assert groups_of(symmetry, "value_output") == {"value_output": "general_linear"}
    assert legs_of(symmetry, "attn.value_output") == {"v.weight": "vector", "v.bias": "vector", "o.weight": "covector"}


def test_key_value_heads_change_places_with_their_query_heads() -> None:
    symmetry = symmetry_map([attention(rotary=6)])
    assert groups_of(symmetry, "heads") == {"heads": "permutation"}
    assert set(legs_of(symmetry, "attn.heads").values()) == {"vector"}
    covered = {
        tensor: [(leg.element_stride, leg.offset, leg.spectators) for leg in legs if leg.space == "attn.heads"]
        for tensor, legs in symmetry.legs.items()
    }
    both_parts = [(MEMBERS * SIZE, 0, ((MEMBERS, SIZE), (6, 1))), (MEMBERS * SIZE, 6, ((MEMBERS, SIZE), (2, 1)))]
    assert covered["q.weight"] == covered["q.bias"] == both_parts
    assert covered["v.weight"] == [(SIZE, 0, ((SIZE, 1),))]
    assert covered["o.weight"] == [(MEMBERS * SIZE, 0, ((MEMBERS, SIZE), (SIZE, 1)))]


def test_heads_that_differ_by_more_than_their_weights_stay() -> None:
    assert groups_of(symmetry_map([attention(position="alibi", heads_limit="slopes")]), "heads") == {}
    alone = replace(attention(), groups=1, members=6)
    assert groups_of(symmetry_map([alone]), "heads") == {}


def test_heads_under_a_shared_bias_form_one_space() -> None:
    blocks = [
        attention(position="relative_bias", name="one"),
        attention(position="relative_bias", name="two"),
        attention(name="apart"),
    ]
    symmetry = symmetry_map(blocks, [SharedHeads("stack", ("one", "two"), "bias.weight")])
    assert list(symmetry.select("heads")) == ["stack.heads", "apart.heads"]
    (leg,) = symmetry.legs["bias.weight"]
    assert (leg.space, leg.axis, leg.variance) == ("stack.heads", 1, "vector")
    assert sum(leg.space == "stack.heads" for leg in symmetry.legs["o.weight"]) == 2


def test_cross_attention_is_marked_in_every_space() -> None:
    symmetry = symmetry_map([replace(attention(), is_cross=True)])
    assert {space.is_cross for space in symmetry.spaces.values()} == {True}
    assert symmetry.select("query_key", "value_output", "heads", cross_attention=False) == {}


# ----------------------------------------------------------------------------------------------------- feed-forward

UP, DOWN, GATE = (
    Heads("up.weight", "up.bias", 0, 0, 0),
    Heads("down.weight", None, 1, 0, 0),
    Heads("g.weight", None, 0, 0, 0),
)


def feed_forward(**options: Any) -> SymmetryMap:
    return symmetry_map([FeedForward("mlp", 20, UP, DOWN, **options)])


def test_hidden_units_may_always_be_reordered() -> None:
    symmetry = feed_forward()
    (space,) = symmetry.spaces.values()
    assert (space.name, str(space.group), space.size) == ("mlp.order", "permutation", 20)
    assert "activation" in space.limit
    assert legs_of(symmetry, "mlp.order") == dict.fromkeys(["up.weight", "up.bias", "down.weight"], "vector")


def test_relu_lets_positive_scales_through() -> None:
    symmetry = feed_forward(activation="relu")
    assert [str(space.group) for space in symmetry.spaces.values()] == ["positive_diagonal", "permutation"]
    assert legs_of(symmetry, "mlp.scale") == {"up.weight": "vector", "up.bias": "vector", "down.weight": "covector"}


def test_a_gate_lets_any_scale_through_beside_it() -> None:
    symmetry = feed_forward(gate=GATE)
    assert [str(space.group) for space in symmetry.spaces.values()] == ["diagonal", "permutation"]
    assert "g.weight" not in legs_of(symmetry, "mlp.scale")
    assert "g.weight" in legs_of(symmetry, "mlp.order")


# ------------------------------------------------------------------------------------------------------ the whole


def test_a_tensor_may_end_with_what_no_leg_takes() -> None:
    """Queries and gates by turns: of each head's 16 rows the first 8 are queries."""
    by_turns = Heads("q.weight", None, 0, 0, MEMBERS * 2 * SIZE, 2 * SIZE)
    mixed = replace(attention(), parts=(ScorePart(by_turns, KEY, SIZE),))
    lengths = possible_lengths(symmetry_map([mixed]))
    assert lengths["q.weight"][0] == {GROUPS * MEMBERS * 2 * SIZE - SIZE, GROUPS * MEMBERS * 2 * SIZE}
    assert lengths["k.weight"][0] == {GROUPS * SIZE}
    assert possible_lengths(symmetry_map([attention()]))["q.weight"][0] == {GROUPS * MEMBERS * SIZE}


def test_extents_hold_every_leg() -> None:
    extents = tensor_extents(symmetry_map([attention(rotary=6), FeedForward("mlp", 20, UP, DOWN)]))
    assert extents == {
        "q.weight": {0: GROUPS * MEMBERS * SIZE},
        "q.bias": {0: GROUPS * MEMBERS * SIZE},
        "k.weight": {0: GROUPS * SIZE},
        "k.bias": {0: GROUPS * SIZE},
        "v.weight": {0: GROUPS * SIZE},
        "v.bias": {0: GROUPS * SIZE},
        "o.weight": {1: GROUPS * MEMBERS * SIZE},
        "up.weight": {0: 20},
        "up.bias": {0: 20},
        "down.weight": {1: 20},
    }


def test_an_absent_bias_has_no_leg() -> None:
    bare = replace(attention(), value=replace(VALUE, bias=None))
    assert None not in symmetry_map([bare]).legs
    assert "v.bias" not in symmetry_map([bare]).legs


def test_an_architecture_knows_its_blocks_apart() -> None:
    mlp = FeedForward("mlp", 20, UP, DOWN)
    architecture = Architecture("toy", (attention(), mlp))
    assert architecture.attentions == (attention(),)
    assert architecture.feed_forwards == (mlp,)
    assert architecture.attentions[0].num_heads == GROUPS * MEMBERS
    assert architecture == Architecture("toy", (attention(), mlp))
    assert architecture != Architecture("toy", (mlp,))
    assert "symmetry" not in repr(architecture)
