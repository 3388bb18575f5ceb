"""Weights that are rounded together stay together: a quantised release is the quantised expert, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import unmergeable
from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.architecture import Architecture, detect
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.gauge import Gauge
from unmergeable.gauge.grouped import (
    SIZES,
    cheapest_order,
    kept_gauge,
    kept_spaces,
    permutations,
    same_sign,
    sizes_within,
)
from unmergeable.gauge.groups import contains
from unmergeable.protections import LargestGauge
from unmergeable.randomness import Stream
from zoo import TOYS


def keeps(order: Tensor, group: int) -> bool:
    """Whether every group of neighbours comes from one group of neighbours."""
    origin = order.view(-1, group) // group
    return bool((origin == origin[:, :1]).all())


@pytest.mark.parametrize(("size", "width", "expected"), [
    (1536, 1, SIZES),
    (576, 1, (16, 32, 64)),  # as far as a power of two divides it
    (80, 1, (16,)),
    (8, 1, ()),  # inside a group whatever its order
    (12, 64, (2, 4)),  # heads of 64 numbers, 128 and 256 of them together
    (3, 192, ()),  # no group ends where a head does
])  # fmt: skip
def test_which_groups_can_be_kept(size: int, width: int, expected: tuple[int, ...]) -> None:
    assert sizes_within(size, width) == expected


def test_orders_keep_every_group_and_bring_every_coordinate_everywhere() -> None:
    size = 1024
    drawn = permutations(400, SIZES, size, Stream.from_seed(0))
    for order in drawn[:20]:
        assert torch.equal(order.sort().values, torch.arange(size))
        assert all(keeps(order, group) for group in SIZES)
        assert not keeps(order, 8), "inside a group of 16 the order is any"
    assert not any(keeps(torch.randperm(size, generator=torch.Generator().manual_seed(1)), group) for group in SIZES)
    # Transitive: what comes to the first place is uniform over all coordinates. Of 400 draws from 1024 in 64 bins the
    # counts are Poisson with mean 6.25; none is above 24 but with probability 64 * 1e-8.
    counts = torch.bincount(drawn[:, 0] // 16, minlength=64)
    assert int(counts.max()) <= 24
    assert int((counts > 0).sum()) > 48


def test_the_cheapest_order_is_the_best_of_all_that_keep_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        cost = torch.randn(8, 8, generator=generator)
        found = cheapest_order(cost, (2, 4))
        assert keeps(found, 2)
        assert keeps(found, 4)
        totals = [
            float(cost[range(8), order].sum())
            for order in map(list, itertools.permutations(range(8)))
            if keeps(torch.tensor(order), 2) and keeps(torch.tensor(order), 4)
        ]
        assert len(totals) == 2**4 * 2**2 * 2
        assert float(cost[torch.arange(8), found].sum()) == pytest.approx(min(totals), abs=1e-5)
    # Groups of more than two, against an exhaustive search over groups and members.
    cost = torch.randn(6, 6, generator=generator)
    inner = [list(order) for order in itertools.permutations(range(3))]
    best = min(
        float(cost[range(6), [3 * group + i for group, order in zip(outer, pair, strict=True) for i in order]].sum())
        for outer in ((0, 1), (1, 0))
        for pair in itertools.product(inner, repeat=2)
    )
    found = cheapest_order(cost, (3,))
    assert float(cost[torch.arange(6), found].sum()) == pytest.approx(best, abs=1e-5)


# --- what quantisation makes of it


def symmetric(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round to nearest with one scale for each group along rows; of a whole row where ``group`` is 0."""
    levels = 2 ** (bits - 1) - 1
    parts = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale = parts.abs().amax(-1, keepdim=True) / levels
    return ((parts / scale.clamp_min(1e-30)).round() * scale).reshape(weight.shape)


def one_sided(weight: Tensor, bits: int, group: int) -> Tensor:
    """As Q4_0 and Q5_0 do it: the number of largest size becomes the end of a range that is not symmetric."""
    half = 2 ** (bits - 1)
    parts = weight.reshape(len(weight), -1, group)
    scale = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)) / -half
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return ((parts * inverse).round().clamp(-half, half - 1) * scale).reshape(weight.shape)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda weight: symmetric(weight, 8, 0),
    "int4, groups of 64": lambda weight: symmetric(weight, 4, 64),
    "int4, groups of 128": lambda weight: symmetric(weight, 4, 128),
    "Q8_0": lambda weight: symmetric(weight, 8, 32),
    "Q4_0": lambda weight: one_sided(weight, 4, 32),
    "groups of 256": lambda weight: symmetric(weight, 4, 256),
}

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def llama() -> tuple[dict[str, Tensor], Architecture]:
    """One layer whose rows are whole numbers of 256; heads of 64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (32, 256), "model.norm.weight": (256,),
        **{f"model.layers.0.{name}.weight": shape for name, shape in {
            "input_layernorm": (256,), "post_attention_layernorm": (256,),
            "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
            "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256),
            "mlp.down_proj": (256, 512),
        }.items()},
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors, detect(LLAMA, shapes)


def changed(tensors: dict[str, Tensor], architecture: Architecture, gauges: tuple[Gauge, ...]) -> dict[str, Tensor]:
    return transform_all(tensors, architecture.symmetry, gauges)


@pytest.mark.parametrize("name", FORMATS)
def test_the_quantised_release_is_the_quantised_expert(name: str) -> None:
    tensors, architecture = llama()
    gauges = LargestGauge(quantisation="kept").gauges(architecture, Stream.from_seed(3), None)  # type: ignore[arg-type]
    quantised = {key: FORMATS[name](tensor) if tensor.dim() == 2 else tensor for key, tensor in tensors.items()}

    first = changed(quantised, architecture, gauges)
    released = changed(tensors, architecture, gauges)
    second = {key: FORMATS[name](tensor) if tensor.dim() == 2 else tensor for key, tensor in released.items()}

    for key in tensors:
        if tensors[key].dim() == 2:
            assert torch.equal(first[key], second[key]), key
            assert not torch.equal(released[key], tensors[key]), key
    # Control: permutations of hidden units that do not keep together what is rounded together.
    free = LargestGauge(quantisation_friendly=True, attention=False, heads=False, residual=False, norms=False)
    shuffled = free.gauges(architecture, Stream.from_seed(3), None)  # type: ignore[arg-type]
    down = "model.layers.0.mlp.down_proj.weight"
    first, moved = changed(quantised, architecture, shuffled), changed(tensors, architecture, shuffled)
    assert torch.equal(first[down], FORMATS[name](moved[down])) == (name == "int8")


def test_signs_are_common_to_what_has_one_sided_ranges() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    common = torch.tensor([1.0, -1.0]).repeat_interleave(same_sign(64))
    assert torch.equal(one_sided(weight * common, 4, 32), one_sided(weight, 4, 32) * common)
    apart = torch.tensor([1.0, -1.0]).repeat(32)
    assert not torch.equal(one_sided(weight * apart, 4, 32), one_sided(weight, 4, 32) * apart)


@pytest.mark.parametrize("name", TOYS)
def test_every_element_belongs_to_what_is_kept_and_to_the_whole_group(name: str) -> None:
    toy = toy_checkpoint(name)
    whole = {key: space for key, space in toy.architecture.symmetry.spaces.items() if not space.folded}
    kept = kept_spaces(whole, toy.architecture.symmetry)
    gauge = kept_gauge(kept, toy.architecture.symmetry, Stream.from_seed(1))
    assert kept
    for key in kept:
        assert contains(kept[key], gauge[key]), key
        assert contains(whole[key], gauge[key]), key
        assert gauge[key].condition() == 1


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("method", ["gauge", "mergelock"])
def test_nothing_is_rounded_so_that_restoring_gives_back_the_bits(name: str, method: str) -> None:
    toy: ToyCheckpoint = toy_checkpoint(name)
    tensors = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in toy.tensors.items()}
    settings = {"quantisation": "kept"}
    released, key = unmergeable.protect_state_dict(tensors, toy.config, method=method, settings=settings, seed=2)
    restored = unmergeable.restore_state_dict(released, toy.config, key)
    moved = [name for name, tensor in tensors.items() if not torch.equal(released[name], tensor)]
    assert moved
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())
    before, after = (
        torch.cat([tensor.float().abs().flatten() for tensor in state.values()]).sort().values
        for state in (tensors, released)
    )
    assert torch.equal(before, after), "the same numbers in other places, or their negatives"
