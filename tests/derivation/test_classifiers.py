"""Networks that read images: kernels of one place are products, windows lie between heads and tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from unmergeable.architecture.blocks import FeedForward, Heads
from unmergeable.architecture.rules import symmetry_map
from unmergeable.attacks.hidden_units import match_units, unit_similarity
from unmergeable.derivation import watch
from unmergeable.derivation.build import Specimen, build, default_config
from unmergeable.derivation.derive import NO_ATTENTION, Derivation, derive
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, VISIBLE, Prover
from unmergeable.derivation.shrink import OTHER, SMALL, UNSEEN, shrunken
from unmergeable.derivation.table import _common, _with_strides

POOLFORMER = {
    "model_type": "poolformer",
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "hidden_sizes": [12, 20],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "padding": [2, 1],
}
HIERA = {
    "model_type": "hiera",
    "embed_dim": 16,
    "image_size": [32, 32],
    "depths": [1, 1],
    "num_heads": [2, 8],
    "num_query_pool": 1,
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, False],
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16], "depths": [1], "layer_type": "basic"}


def poolformer() -> Specimen:
    return build(POOLFORMER, transformers.PoolFormerForImageClassification)


def units(found: Derivation) -> list[FeedForward]:
    return [block for block in found.blocks if isinstance(block, FeedForward)]


def test_units_between_kernels_of_one_place_are_proven() -> None:
    small = poolformer()
    found = derive(small)
    assert [(block.size, block.up.axis, block.down.axis) for block in units(found)] == [(48, 0, 1), (80, 0, 1)]
    assert all(block.up.bias == f"{block.name}.conv1.bias" for block in units(found))
    prover = Prover(small, Disk(small.network))
    symmetry = symmetry_map(found.blocks)
    assert prover.together(symmetry, symmetry.spaces) <= TOLERANCE
    mistaken = symmetry_map([replace(block, up=replace(block.up, bias=None)) for block in units(found)])
    assert prover.together(mistaken, mistaken.spaces) >= VISIBLE


def test_units_are_not_seen_where_convolutions_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_CONVOLUTIONS", set())
    assert derive(poolformer()).blocks == []


def test_a_kernel_of_several_places_is_no_product() -> None:
    small = build(RESNET, transformers.ResNetForImageClassification)
    trace = watch.watch(small)
    assert trace.convolutions == 4  # the embedding's, the shortcut's and two of one layer
    assert all("convolution" not in product.name or "shortcut" in product.name for product in trace.products)


def test_a_network_without_attention_says_so() -> None:
    found = derive(build(RESNET, transformers.ResNetForImageClassification))
    assert found.blocks == []
    seen = "no softmax over products of queries and keys was seen"
    assert found.reasons[NO_ATTENTION] == f"{seen}; the network has convolutions"


def test_heads_are_found_beside_windows() -> None:
    small = build(HIERA, transformers.HieraForImageClassification)
    calls = watch.watch(small).attentions
    assert [call.value.shape[-3] for call in calls] == [4, 4], "windows lie where heads do elsewhere"
    found = derive(small)
    assert NO_ATTENTION not in found.reasons
    groups: dict[str, Any] = {block.name: block.groups for block in found.blocks if not isinstance(block, FeedForward)}
    assert sorted(groups.values()) == [2, 8]
    assert len(units(found)) == 2


@pytest.mark.parametrize(("first", "second", "both"), [(True, False, False), (False, True, False), (True, True, True)])
def test_fewer_keys_in_some_layers_are_no_attention_to_another_stream(first: bool, second: bool, both: bool) -> None:
    template = {"name": "block.{}", "groups": 2, "parts": (), "position": "none", "heads_limit": "in order"}
    template["value_group"] = "general_linear"
    assert _common({**template, "is_cross": first}, {**template, "is_cross": second})["is_cross"] is both


@pytest.mark.parametrize("kind", ["swin", "bit", "cvt", "efficientnet"])
def test_a_map_of_stages_is_read_back_for_widths_it_was_not_made_from(kind: str) -> None:
    configs = [shrunken(default_config(kind), sizes) for sizes in (SMALL, OTHER, UNSEEN)]
    names = ("embed_dim", "hidden_sizes", "width_coefficient")
    widths = [repr([small.get(name) for name in names]) for small in configs]
    assert len(set(widths)) == len(configs)


@pytest.mark.parametrize(("offset", "is_same"), [("2 * groups * value_size", True), ("3 * groups * value_size", False)])
def test_an_offset_of_one_head_is_that_of_several(offset: str, is_same: bool) -> None:
    output = {"weight": "proj", "axis": 1}
    single = {"parts": [], "value": {"weight": "qkv", "axis": 0, "offset": "2 * value_size"}, "output": output}
    value = {"weight": "qkv", "axis": 0, "offset": offset, "group_stride": "value_size"}
    other = {"parts": [], "value": value, "output": {**output, "group_stride": "value_size"}}
    found, _ = _with_strides(single, other)
    assert (found == other) is is_same
    assert "offset" not in found["output"]


def test_an_attention_written_as_sums_over_indices_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = 2
    config = {name: value[:stages] for name, value in default_config("cvt").items() if isinstance(value, list)}
    config |= {"model_type": "cvt", "embed_dim": [8, 12], "depth": [1, 2], "num_heads": [1, 3], "image_size": 32}
    config["cls_token"] = [False, True]
    small = build(config, transformers.CvtForImageClassification)
    calls = watch.watch(small).attentions
    assert [call.value.shape[-3] for call in calls] == [1, 3, 3]
    assert all(call.query.shape[-1] == call.value.shape[-1] for call in calls)
    monkeypatch.setattr(watch._Recorder, "_contraction", lambda *_: None)
    assert watch.watch(small).attentions == []


def test_units_of_kernels_are_matched() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"up": torch.randn(5, 3, 1, 1, generator=generator), "down": torch.randn(4, 5, 1, 1, generator=generator)}
    base["bias"] = torch.randn(5, generator=generator)
    order = torch.tensor([3, 0, 4, 1, 2])
    ours = {"up": base["up"][order], "down": base["down"][:, order], "bias": base["bias"][order]}
    block = FeedForward("mlp", 5, Heads("up", "bias", 0, 0, 0), Heads("down", None, 1, 0, 0))
    found = match_units(block, ours, base, unit_similarity).permutation.index[0]
    assert torch.equal(order[found], torch.arange(5))
