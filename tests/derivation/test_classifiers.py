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
STAGES = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [8, 12],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 3],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
EFFICIENTNET = {
    "model_type": "efficientnet",
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "hidden_dim": 320,
    "image_size": 32,
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "expand_ratios": [1, 6],
    "num_block_repeats": [1, 1],
}


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


def test_a_kernel_of_several_places_makes_units_and_reads_them() -> None:
    small = build(RESNET, transformers.ResNetForImageClassification)
    assert watch.watch(small).convolutions == 4  # the embedding's, the shortcut's and two of one layer
    found = derive(small)
    (block,) = units(found)
    layers = [f"resnet.encoder.stages.0.layers.0.layer.{index}" for index in range(2)]
    assert (block.up.weight, block.down.weight) == tuple(f"{layer}.convolution.weight" for layer in layers)
    norm = ("running_mean", "running_var", "weight", "bias")
    assert [heads.weight for heads in block.along] == [f"{layers[0]}.normalization.{name}" for name in norm]
    assert small.network.state_dict()[block.down.weight].shape[2:] == (3, 3)


def test_each_tensor_along_the_units_has_to_follow_them() -> None:
    small = build(RESNET, transformers.ResNetForImageClassification)
    found = derive(small)
    (block,) = units(found)
    prover = Prover(small, Disk(small.network))
    for left in range(len(block.along)):
        rest = (*block.along[:left], *block.along[left + 1 :])
        symmetry = symmetry_map([replace(block, along=rest)])
        assert prover.together(symmetry, symmetry.spaces) >= VISIBLE, block.along[left].weight


@pytest.mark.parametrize(
    "kind", [transformers.PvtV2ForImageClassification, transformers.SegformerForImageClassification]
)
def test_units_pass_a_depthwise_convolution(kind: Any) -> None:
    small = build({**STAGES, "model_type": kind.config_class.model_type}, kind)
    found = derive(small)
    assert [block.size for block in units(found)] == [16, 36]
    for block in units(found):
        kernel = f"{block.name}.dwconv.dwconv"
        assert block.along == (Heads(f"{kernel}.weight", None, 0, 0, 0), Heads(f"{kernel}.bias", None, 0, 0, 0))
        assert set(symmetry_map([block]).spaces) == {f"{block.name}.order"}, "its bias would have to be scaled, too"
    assert sum(not isinstance(block, FeedForward) for block in found.blocks) == 2
    assert found.joint <= TOLERANCE


def test_units_are_weighed_by_what_reads_all_of_them() -> None:
    small = build(EFFICIENTNET, transformers.EfficientNetForImageClassification)
    found = derive(small)
    wide = [block for block in units(found) if "expansion" in block.up.weight]
    assert wide
    for block in wide:
        axes = {heads.weight.removeprefix(f"{block.name}.squeeze_excite."): heads.axis for heads in block.along}
        assert axes["expand.weight"] == 0
        assert axes["reduce.weight"] == 1
    assert found.joint <= TOLERANCE


def test_units_behind_a_squeeze_are_not_found_where_it_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch._Recorder, "_tells_of_all_places", lambda *_: False)
    found = derive(build(EFFICIENTNET, transformers.EfficientNetForImageClassification))
    assert not any("expansion" in block.up.weight for block in units(found))


def test_a_run_of_units_beside_another_in_one_module_has_a_name_of_its_own() -> None:
    config = {**RESNET, "layer_type": "bottleneck"}
    layer = "resnet.encoder.stages.0.layers.0.layer"
    found = derive(build(config, transformers.ResNetForImageClassification))
    assert [block.name for block in units(found)] == [layer, f"{layer}.1_convolution"]


def test_a_network_without_attention_says_so() -> None:
    found = derive(build(RESNET, transformers.ResNetForImageClassification))
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


@pytest.mark.parametrize("kind", ["swin", "bit", "cvt", "efficientnet", "mobilevit"])
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
