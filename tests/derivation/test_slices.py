"""Experts that one tensor holds side by side, and layers that use what others computed: each with a mistaken map."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import FeedForward, Heads, Mixture
from unmergeable.architecture.declare import Names
from unmergeable.architecture.derived import architecture_of, known_map, of_layer
from unmergeable.architecture.rules import possible_lengths, symmetry_map
from unmergeable.architecture.symmetry import SymmetryMap
from unmergeable.attacks.hidden_units import permuted_similarity
from unmergeable.derivation.build import Specimen, class_named
from unmergeable.derivation.model_types import built, confirm, usual_config
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, VISIBLE, Prover
from unmergeable.derivation.shrink import SMALL, UNSEEN, shrunken
from unmergeable.errors import UnsupportedArchitecture
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Monomial
from unmergeable.gauge.gauge import fixed_gauge

EXPERTS, UNITS, HIDDEN = 3, 5, 4


def expert(index: int) -> FeedForward:
    """Gate and up by turns on the last axis, as GPT-OSS stores them."""
    up = Heads("up", "bias", 2, 1, 0, element_stride=2, slice=index)
    return FeedForward(f"experts.{index}", UNITS, up, Heads("down", None, 1, 0, 0, slice=index), replace(up, offset=0))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"up": (EXPERTS, HIDDEN, 2 * UNITS), "bias": (EXPERTS, 2 * UNITS), "down": (EXPERTS, UNITS, HIDDEN)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def reordered(symmetry: SymmetryMap, order: torch.Tensor, space: str) -> dict[str, torch.Tensor]:
    ones = torch.ones(1, len(order), dtype=torch.float64)
    return transform_all(tensors(), symmetry, [fixed_gauge(symmetry.spaces, {space: Monomial(order[None], ones)})])


def test_a_slice_is_changed_and_its_neighbours_are_not() -> None:
    order = torch.tensor([2, 0, 1, 4, 3])
    found, before = reordered(symmetry_map([expert(1)]), order, "experts.1.order"), tensors()
    expected = {name: tensor.clone() for name, tensor in before.items()}
    for start in (0, 1):
        expected["up"][1, :, start::2] = before["up"][1][:, start::2][:, order]
        expected["bias"][1, start::2] = before["bias"][1][start::2][order]
    expected["down"][1] = before["down"][1][order]
    assert all(torch.equal(found[name], expected[name]) for name in before)
    assert not torch.equal(found["up"], before["up"])


def test_every_slice_at_once_is_each_by_itself() -> None:
    symmetry = symmetry_map([expert(index) for index in range(EXPERTS)])
    orders = {f"experts.{index}.order": torch.roll(torch.arange(UNITS), index + 1) for index in range(EXPERTS)}
    ones = torch.ones(1, UNITS, dtype=torch.float64)
    elements = {name: Monomial(order[None], ones) for name, order in orders.items()}
    together = transform_all(tensors(), symmetry, [fixed_gauge(symmetry.spaces, elements)])
    for index, (name, order) in enumerate(orders.items()):
        alone = reordered(symmetry, order, name)
        assert all(torch.equal(together[tensor][index], alone[tensor][index]) for tensor in together)


def test_experts_move_with_what_is_in_them_and_come_back() -> None:
    """In bfloat16 to the bit: units inside a slice first, then the slices, the router's rows with them."""
    blocks = [expert(index) for index in range(EXPERTS)]
    mixture = Mixture(
        "mixture", "router", None, tuple(block.name for block in blocks), (), others=("up", "bias", "down")
    )
    symmetry = symmetry_map(blocks, mixtures=[mixture])
    stored = {**tensors(), "router": torch.arange(EXPERTS * HIDDEN).reshape(EXPERTS, HIDDEN).double()}
    before = {name: tensor.bfloat16() for name, tensor in stored.items()}
    ones, turned = torch.ones(1, UNITS, dtype=torch.float64), torch.tensor([[2, 0, 1]])
    elements = {
        f"experts.{index}.order": Monomial(torch.roll(torch.arange(UNITS), index + 1)[None], ones) for index in (0, 2)
    }
    elements["mixture.experts"] = Monomial(turned, ones[:, :EXPERTS])
    gauge = fixed_gauge(symmetry.spaces, elements)
    after = transform_all(before, symmetry, [gauge])
    assert torch.equal(after["router"], before["router"][turned[0]])
    assert torch.equal(after["down"][0], before["down"][2][torch.roll(torch.arange(UNITS), 3)])
    back = transform_all(after, symmetry, [gauge.inverse()])
    assert all(torch.equal(back[name], before[name]) for name in before)


def test_slices_count_for_the_shape_of_a_tensor() -> None:
    lengths = possible_lengths(symmetry_map([expert(EXPERTS - 1)]))
    assert lengths["up"] == {0: frozenset({EXPERTS}), 2: frozenset({2 * UNITS})}


def test_units_of_a_slice_are_recognised() -> None:
    order = torch.tensor([2, 0, 1, 4, 3])
    block, before = expert(1), tensors()
    ours = reordered(symmetry_map([block]), order, "experts.1.order")
    best = permuted_similarity(block, ours, before).argmax(1)
    assert torch.equal(order[best], torch.arange(UNITS))


def specimen(kind: str, **settings: object) -> Specimen:
    derived = known_map(kind)
    assert derived is not None
    network = class_named(derived.network_class)
    return built({**usual_config(kind, network), **settings}, network, UNSEEN)


def read_back(kind: str, small: Specimen) -> tuple[Architecture, Prover]:
    derived = known_map(kind)
    assert derived is not None
    prover = Prover(small, Disk(small.network))
    names = Names({name: tuple(tensor.shape) for name, tensor in prover.weights.items()})
    return architecture_of(derived, small.config, names), prover


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_every_expert_is_a_block_and_all_may_be_reordered(kind: str) -> None:
    small = specimen(kind)
    found, prover = read_back(kind, small)
    layers, experts = small.config["num_hidden_layers"], small.config["num_local_experts"]
    assert len(found.feed_forwards) == layers * experts
    assert [len(mixture.experts) for mixture in found.mixtures] == [experts] * layers
    spaces = found.symmetry.select("feed_forward", "experts")
    assert prover.together(found.symmetry, spaces) <= TOLERANCE
    moved = found.symmetry.select("experts")
    mistaken = replace(found, mixtures=tuple(replace(one, others=one.others[1:]) for one in found.mixtures))
    assert prover.together(mistaken.symmetry, moved) >= VISIBLE


def test_gate_and_up_by_turns_are_not_one_above_the_other() -> None:
    found, prover = read_back("gpt_oss", specimen("gpt_oss"))
    first = found.feed_forwards[0]
    assert first.gate is not None
    assert (first.gate.element_stride, first.up.element_stride, first.up.offset) == (2, 2, 1)
    halves = replace(
        first, gate=replace(first.gate, element_stride=1), up=replace(first.up, element_stride=1, offset=first.size)
    )
    for block, holds in ((first, True), (halves, False)):
        symmetry = symmetry_map([block])
        assert (prover.together(symmetry, symmetry.spaces) <= TOLERANCE) is holds


def test_a_clamp_that_the_network_reaches_forbids_scales() -> None:
    """The limit of a small network is small: at the usual one nothing would be clamped."""
    found, prover = read_back("gpt_oss", specimen("gpt_oss"))
    assert found.feed_forwards[0].scale_limit
    scaled = symmetry_map([replace(found.feed_forwards[0], scale_limit="")])
    assert prover.together(scaled, scaled.select("feed_forward")) >= VISIBLE
    assert shrunken({"num_hidden_layers": 2, "swiglu_limit": 7.0})["swiglu_limit"] == 0.5


def test_values_that_other_layers_read_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = known_map("gemma3n_text")
    assert derived is not None
    small = specimen("gemma3n_text")
    assert small.config["num_kv_shared_layers"] == 2
    found, _ = read_back("gemma3n_text", small)
    kinds = small.config["layer_types"]
    numbers = [int(block.name.split(".")[2]) for block in found.attentions]
    read = {max(n for n in range(len(kinds) - 2) if kinds[n] == kind) for kind in kinds[-2:]}
    assert numbers == [n for n in range(len(kinds) - 2) if n not in read]
    assert len(found.feed_forwards) >= len(kinds)
    confirm(derived, small)
    monkeypatch.setattr(
        "unmergeable.architecture.derived._with_own_values",
        lambda numbers, config: [own for own in numbers if own[0] < len(kinds) - 2],
    )
    with pytest.raises(UnsupportedArchitecture, match="changes outputs"):
        confirm(derived, small)


def test_files_that_hold_unread_values_do_not_mislead() -> None:
    """Older files have keys and values in the layers that share those of others: the config counts."""
    derived = known_map("gemma3n_text")
    assert derived is not None
    small = specimen("gemma3n_text")
    shapes = {name: tuple(tensor.shape) for name, tensor in Prover(small, Disk(small.network)).weights.items()}
    last = len(small.config["layer_types"]) - 1
    for side in ("k_proj", "v_proj"):
        shapes[f"model.layers.{last}.self_attn.{side}.weight"] = shapes[f"model.layers.0.self_attn.{side}.weight"]
    found = architecture_of(derived, small.config, Names(shapes))
    assert all(f".{last}." not in block.name for block in found.attentions)


def test_heads_are_counted_by_the_lengths_of_tensors() -> None:
    found, _ = read_back("mimo_v2_flash", specimen("mimo_v2_flash"))
    assert len({block.groups for block in found.attentions}) == 2
    assert len({block.num_heads for block in found.attentions}) == 1


def test_settings_of_one_layer_hold_there() -> None:
    settings = {"head_dim": 8, "per_layer_config": {"02": {"head_dim": 4}}, "counts": [1, 2, 3]}
    assert of_layer(settings, (2,)) == {"head_dim": 4, "counts[layer]": 3}
    assert of_layer(settings, (1,)) == {"counts[layer]": 2}


def test_shares_of_a_head_come_out_as_pairs() -> None:
    small = shrunken({"num_hidden_layers": 2, "head_dim": 192, "partial_rotary_factor": 0.334}, SMALL)
    assert small["head_dim"] * small["partial_rotary_factor"] == 6
    kept = shrunken({"num_hidden_layers": 2, "head_dim": 64, "partial_rotary_factor": 0.5}, SMALL)
    assert kept["partial_rotary_factor"] == 0.5
