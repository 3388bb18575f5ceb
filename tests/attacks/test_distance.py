"""Distances count every number of a block once, and attribute it to the right half."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.planted import Build
from unmergeable.attacks.distance import Distance, block_distances, parts, relative_distance
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput

# In these, every number of every tensor that lives in a space belongs to a block.
WHOLE = [
    "llama",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon-40b-like",
    "qwen3",
    "olmo2",
    "bert",
    "mixtral",
    pytest.param("unet-sd15", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", WHOLE)
def test_counts_every_number_once(name: str, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    distances = block_distances(expert, toy.base, toy.architecture)

    symmetry = toy.architecture.symmetry
    owned = symmetry.tensors_of(symmetry.select("query_key", "value_output", "feed_forward"))
    squares = [float((expert.tensors[key] - toy.base.tensors[key]).double().square().sum()) for key in owned]
    assert math.hypot(*(distance.difference for distance in distances)) == pytest.approx(
        math.sqrt(sum(squares)), rel=1e-6
    )
    assert sum(distance.numel for distance in distances) == sum(toy.base.tensors[key].numel() for key in owned)


@pytest.mark.parametrize(
    ("name", "tensor", "rows", "expected"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight", (slice(None), slice(48, 96)), "query_key"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", (slice(None), slice(96, 144)), "value_output"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias", (slice(96, 144),), "value_output"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", (slice(0, 72),), "query_key"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", (slice(72, 96),), "value_output"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", (slice(None),), "feed_forward"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj.weight", (slice(0, 10),), "query_key"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj.weight", (slice(10, 22),), "value_output"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight", (slice(None),), "query_key"),
    ],
)
def test_attributes_a_change_to_its_part(
    name: str, tensor: str, rows: tuple[slice, ...], expected: str, network: Build
) -> None:
    toy = network(name)
    changed = toy.base.tensors[tensor].clone()
    changed[rows] += 1
    distances = block_distances(MemorySource({**toy.base.tensors, tensor: changed}), toy.base, toy.architecture)

    (moved,) = [distance for distance in distances if distance.difference > 0]
    assert moved.part == expected
    assert ".1." in moved.block
    assert moved.difference == pytest.approx(math.sqrt(changed[rows].numel()), rel=1e-5)


def test_relative_distance_of_several_parts() -> None:
    first = Distance("a", "query_key", 3.0, 8.0, 10)
    second = Distance("a", "value_output", 4.0, 6.0, 10)

    assert first.relative == 3 / 8
    assert relative_distance([first, second]) == 0.5
    assert relative_distance([]) == 0
    assert Distance("a", "query_key", 1.0, 0.0, 10).relative == math.inf


def test_parts_follow_the_network(network: Build) -> None:
    found = [(part.block, part.name) for part in parts(network("bert").architecture)]

    layers = [f"bert.encoder.layer.{index}" for index in range(2)]
    assert [name for _, name in found] == ["query_key", "value_output", "feed_forward"] * 2
    assert all(block.startswith(layers[place // 3]) for place, (block, _) in enumerate(found))


def test_refuses_what_is_not_a_number(network: Build) -> None:
    toy = network("bert")
    name = "bert.encoder.layer.1.output.dense.weight"
    damaged = MemorySource({**toy.base.tensors, name: torch.full_like(toy.base.tensors[name], torch.inf)})

    with pytest.raises(BadInput, match=r"bert\.encoder\.layer\.1.*holds NaN or infinity"):
        block_distances(damaged, toy.base, toy.architecture)


def test_reports_progress(network: Build) -> None:
    toy = network("bert")
    calls: list[tuple[str, int, int, str]] = []
    block_distances(toy.base, toy.base, toy.architecture, lambda *call: calls.append(call))

    assert calls == [("measuring", done, 6, "parts") for done in range(1, 7)]
