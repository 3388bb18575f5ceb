"""The proof: it refuses a mistake in the map, a probe that lies, and a group that nothing shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from unmergeable.architecture.blocks import Attention, FeedForward
from unmergeable.architecture.rules import symmetry_map
from unmergeable.derivation import scene as scenes
from unmergeable.derivation.build import Specimen, build
from unmergeable.derivation.derive import derive
from unmergeable.derivation.model_types import built, usual_config
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, Prover
from unmergeable.derivation.shrink import SMALL
from zoo import TOYS


@pytest.fixture(scope="module")
def llama() -> Specimen:
    network = TOYS["llama"].build()
    return build(network.config.to_dict(), type(network))


@pytest.fixture(scope="module")
def blocks(llama: Specimen) -> tuple[Attention, FeedForward]:
    found = derive(llama).blocks
    attention = next(block for block in found if isinstance(block, Attention))
    feed_forward = next(block for block in found if isinstance(block, FeedForward))
    return attention, feed_forward


def failures(specimen: Specimen, block: Attention | FeedForward) -> list[str]:
    prover = Prover(specimen, Disk(specimen.network))
    symmetry = symmetry_map([block])
    every = symmetry.select("query_key", "value_output", "heads", "feed_forward")
    return [name.rsplit(".", 1)[-1] for name, space in every.items() if not prover.prove(symmetry, space).holds]


def test_a_right_map_holds_to_double_precision(llama: Specimen, blocks: Any) -> None:
    for block in blocks:
        assert failures(llama, block) == []


def test_the_network_is_as_before_after_a_proof(llama: Specimen, blocks: Any) -> None:
    with torch.no_grad():
        before = llama.outputs()
        failures(llama, blocks[0])
        assert torch.equal(llama.outputs(), before)


def test_a_wrong_pairing_is_refused(llama: Specimen, blocks: Any) -> None:
    attention = blocks[0]
    (part,) = attention.parts
    assert failures(llama, replace(attention, parts=(replace(part, rotary="interleaved"),))) == ["query_key"]
    assert failures(llama, replace(attention, parts=(replace(part, rotary=None),))) == ["query_key"]


def test_swapped_tensors_are_refused(llama: Specimen, blocks: Any) -> None:
    attention, feed_forward = blocks
    (part,) = attention.parts
    swapped = replace(attention, value=part.key, parts=(replace(part, key=attention.value),))
    assert {"query_key", "value_output"} <= set(failures(llama, swapped))
    assert failures(llama, replace(feed_forward, gate=feed_forward.up, up=feed_forward.gate)) == ["scale"]
    assert failures(llama, replace(feed_forward, gate=None)) == ["order"]


def test_a_group_that_the_outputs_do_not_depend_on_is_refused(llama: Specimen, blocks: Any) -> None:
    """A dead block keeps the function under anything: the control notices that nothing was shown."""
    feed_forward = blocks[1]
    weight = llama.network.get_parameter(feed_forward.down.weight)
    kept = weight.data.clone()
    weight.data.zero_()
    try:
        prover = Prover(llama, Disk(llama.network))
        symmetry = symmetry_map([feed_forward])
        proof = prover.prove(symmetry, symmetry.spaces[f"{feed_forward.name}.scale"])
    finally:
        weight.data.copy_(kept)
    assert proof.change <= TOLERANCE
    assert not proof.holds


def test_a_larger_group_than_declared_is_noticed(llama: Specimen, blocks: Any) -> None:
    """What the control draws from outside a group is not in it: for GL there is nothing larger."""
    prover = Prover(llama, Disk(llama.network))
    symmetry = symmetry_map(blocks)
    for name, space in symmetry.select("query_key", "value_output", "feed_forward").items():
        proof = prover.prove(symmetry, space)
        assert (proof.outside is None) == (space.group.kind == "general_linear"), name


def test_a_probe_that_lies_is_caught(llama: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of keys reported in the order of another head: nothing of the attention survives but its values."""
    honest = scenes.Scene.spot

    def lying(scene: scenes.Scene, row: scenes.Row) -> Any:
        spot = honest(scene, row)
        return replace(spot, place=spot.place ^ 1) if spot.weight.endswith("k_proj.weight") else spot

    monkeypatch.setattr(scenes.Scene, "spot", lying)
    found = [block for block in derive(llama).blocks if isinstance(block, Attention)]
    assert all(block.parts == () for block in found)


def test_a_bias_that_the_softmax_does_not_see_hides_no_group() -> None:
    """What is added to every key changes no score; that the gains matter shows when another side is left alone."""
    kind = transformers.PersimmonForCausalLM
    small = built(usual_config("persimmon", kind), kind, SMALL)
    block = next(one for one in derive(small).blocks if isinstance(one, Attention))
    prover = Prover(small, Disk(small.network))
    symmetry = symmetry_map([block])
    space = symmetry.spaces[f"{block.name}.query_key_gain.1"]
    assert block.norm is not None
    assert block.norm.key_bias is not None
    legs = {**symmetry.legs, block.norm.key_bias: ()}
    unseen = prover.together(replace(symmetry, legs=legs), {space.name: space})
    assert unseen <= TOLERANCE, "the bias of the keys alone would show nothing"
    assert prover.prove(symmetry, space).holds
