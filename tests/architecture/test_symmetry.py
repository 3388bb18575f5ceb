"""Symmetry maps as data: what a leg spans, what a selection holds, and that every family's map is consistent."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError
from typing import Any, get_args

import pytest

from toy_checkpoints import toy_checkpoint
from unmergeable.architecture import Group, Leg, Space, SymmetryMap
from unmergeable.architecture.symmetry import GroupKind
from zoo import TOYS

PAIRED = {"rotary", "quarter_turn", "pair_sign", "pair_scale"}


@pytest.mark.parametrize("kind", get_args(GroupKind))
def test_a_pairing_is_given_where_pairs_are_spoken_of_and_nowhere_else(kind: GroupKind) -> None:
    if kind in PAIRED:
        assert str(Group(kind, "half")) == f"{kind}(half)"
        assert Group(kind, "half") != Group(kind, "interleaved")
    else:
        assert str(Group(kind)) == kind
    with pytest.raises(AssertionError):
        Group(kind, None if kind in PAIRED else "half")


def coordinates(leg: Leg, space: Space) -> list[int]:
    """Every place on the axis that a leg lists, from its docstring."""
    copies = itertools.product(*(range(count) for count, _ in leg.spectators))
    shifts = [sum(at * stride for at, (_, stride) in zip(copy, leg.spectators, strict=True)) for copy in copies]
    return [
        leg.offset + block * leg.block_stride + index * leg.element_stride + shift
        for block in range(space.blocks)
        for index in range(space.size)
        for shift in shifts
    ]


@pytest.mark.parametrize(
    "leg",
    [
        Leg("s", 0, "vector", 0, 4),
        Leg("s", 0, "vector", 7, 12, 1, ((3, 4),)),
        Leg("s", 1, "covector", 2, 0, 6, ((2, 3), (3, 1))),
        Leg("s", 0, "vector", 0, 1, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_extent_is_one_beyond_the_last_coordinate(leg: Leg, blocks: int) -> None:
    space = Space("s", "query_key", Group("general_linear"), blocks, 4)
    assert leg.extent(space) == max(coordinates(leg, space)) + 1


def example() -> SymmetryMap:
    def space(name: str, role: Any, **more: Any) -> Space:
        return Space(name, role, Group("general_linear"), 1, 2, **more)

    spaces = (
        space("a", "query_key"),
        space("b", "value_output"),
        space("c", "query_key", is_cross=True),
        space("d", "query_key", epsilon=1e-6),
        space("e", "feed_forward"),
    )
    legs = {"w": (Leg("a", 0, "vector", 0, 2), Leg("b", 0, "vector", 2, 2)), "v": (Leg("c", 0, "vector", 0, 2),)}
    return SymmetryMap({item.name: item for item in spaces}, legs)


def test_selecting_by_role_leaves_out_what_is_not_exact() -> None:
    symmetry = example()
    assert list(symmetry.select("query_key")) == ["a", "c"]
    assert list(symmetry.select("query_key", negligible_epsilon=True)) == ["a", "c", "d"]
    assert list(symmetry.select("query_key", cross_attention=False)) == ["a"]
    assert list(symmetry.select("feed_forward", "query_key", "value_output")) == ["a", "b", "c", "e"]  # network's order
    assert symmetry.select() == {}
    assert symmetry.select("heads") == {}


def test_tensors_of_spaces() -> None:
    symmetry = example()
    assert symmetry.tensors_of({"a"}) == symmetry.tensors_of({"b"}) == ["w"]
    assert symmetry.tensors_of({"c", "b"}) == ["w", "v"]
    assert symmetry.tensors_of(set()) == symmetry.tensors_of({"e"}) == []


def test_maps_are_frozen() -> None:
    for item in (Group("permutation"), example().spaces["a"], example().legs["v"][0], example()):
        with pytest.raises(FrozenInstanceError):
            item.name = "x"  # type: ignore[misc]


# ------------------------------------------------------------------------------------------- every family's map


@pytest.mark.parametrize("name", TOYS)
def test_every_leg_lies_on_its_tensor_and_meets_no_coordinate_twice(name: str) -> None:
    toy = toy_checkpoint(name)
    symmetry = toy.architecture.symmetry
    assert set(symmetry.legs) <= set(toy.tensors)
    for tensor, legs in symmetry.legs.items():
        for leg in legs:
            space, shape = symmetry.spaces[leg.space], toy.tensors[tensor].shape
            places = coordinates(leg, space)
            assert min(places) >= 0
            assert max(places) < shape[leg.axis], (tensor, leg)
            assert len(set(places)) == len(places), (tensor, leg)


@pytest.mark.parametrize("name", TOYS)
def test_every_space_is_left_and_entered(name: str) -> None:
    """A basis change that nobody undoes is none: every space but a norm's own scale has legs on two tensors or more."""
    symmetry = toy_checkpoint(name).architecture.symmetry
    for space in symmetry.spaces.values():
        legs = [(tensor, leg) for tensor, every in symmetry.legs.items() for leg in every if leg.space == space.name]
        swallowed = space.epsilon > 0 or space.group.kind in {"pair_sign", "block_sign"}
        legs += [(stack.members[0], leg) for stack in symmetry.stacks for leg in stack.legs if leg.space == space.name]
        assert len(legs) >= (1 if space.epsilon > 0 else 2), space.name
        variances = {leg.variance for _, leg in legs}
        # Reorderings and signs are their own inverse transposes; everything else needs both sides.
        if not swallowed and space.group.kind not in {"permutation", "quarter_turn"}:
            assert variances - {"gain"} == {"vector", "covector"}, space.name


@pytest.mark.parametrize("name", TOYS)
def test_limits_are_said_where_the_group_is_smaller_than_it_could_be(name: str) -> None:
    for space in toy_checkpoint(name).architecture.symmetry.select("query_key", "value_output").values():
        assert bool(space.limit) == (space.group.kind != "general_linear"), space.name
        assert "\n" not in space.limit


@pytest.mark.parametrize("name", TOYS)
def test_inside_of_heads_comes_before_their_order(name: str) -> None:
    symmetry = toy_checkpoint(name).architecture.symmetry
    for tensor, legs in symmetry.legs.items():
        is_outer = [symmetry.spaces[leg.space].role == "heads" for leg in legs]
        assert is_outer == sorted(is_outer), tensor
