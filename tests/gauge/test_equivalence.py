"""Equal checkpoints are found equal within a derived bound, and every way of not being equal is found out."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.architecture import Architecture, FeedForward, Space
from unmergeable.architecture.blocks import Heads
from unmergeable.architecture.symmetry import Group
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import UnsupportedArchitecture
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.equivalence import (
    ROUNDED_FACTORS,
    UNIT_ROUNDOFF,
    BlockError,
    Equivalence,
    changed_blocks,
    compare,
)
from unmergeable.gauge.gauge import Gauge, fixed_gauge, sampled_gauge
from unmergeable.gauge.groups import sample
from unmergeable.randomness import Stream

State = dict[str, Tensor]
CONDITION = 4.0
EVERYTHING = ("query_key", "value_output", "heads", "feed_forward")
FAMILIES = [
    "llama", "llama-bias-tied-mqa", "qwen2", "qwen3", "gemma3", "phi", "phi-qk-norm", "phi3", "gpt2", "gptj", "opt",
    "bloom", "falcon-40b-like", "stablelm-qk-norm", "cohere-qk-norm", "olmo2", "mixtral", "deepseek_v3", "bert",
    "dinov2-swiglu", "siglip", "t5", "flan-t5", "unet-sd15",
]  # fmt: skip
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def source(tensors: Mapping[str, Tensor], name: str = "checkpoint") -> MemorySource:
    return MemorySource(tensors, {}, Path(name))


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def whole_gauge(architecture: Architecture, seed: int = 1, condition: float = CONDITION) -> Gauge:
    """A random element of every exact symmetry of the network."""
    return sampled_gauge(architecture.symmetry.select(*EVERYTHING), Stream.from_seed(seed), condition)


def moved(toy: ToyCheckpoint, dtype: torch.dtype = torch.float32, **draw: float) -> tuple[State, State]:
    """A network in ``dtype``, and the same under a random gauge."""
    tensors = cast(toy.tensors, dtype)
    gauge = whole_gauge(toy.architecture, **draw)  # type: ignore[arg-type]
    return tensors, transform_all(tensors, toy.architecture.symmetry, [gauge])


def found(
    toy: ToyCheckpoint,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    condition: float = CONDITION,
    seed: int = 0,
) -> Equivalence:
    return compare(source(first), source(second), toy.architecture, condition=condition, seed=seed, threads=1)


def body(toy: ToyCheckpoint) -> set[str]:
    """The tensors inside blocks: all but embeddings, norms of the stream, heads."""
    return set(toy.architecture.symmetry.tensors_of(toy.architecture.symmetry.select(*EVERYTHING)))


# ------------------------------------------------------------------------------------------------- what is equal


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_symmetry_is_within_the_bound(name: str, dtype: torch.dtype) -> None:
    toy = toy_checkpoint(name)
    first, second = moved(toy, dtype)
    result = found(toy, first, second)
    assert result.is_equal, result.explain()
    assert [block.name for block in result.blocks] == [block.name for block in toy.architecture.blocks]
    assert {block.bound for block in result.blocks} == {ROUNDED_FACTORS * UNIT_ROUNDOFF[CODES[dtype]] * CONDITION}
    assert sum(block.error > 0 for block in result.blocks) >= len(toy.architecture.attentions)  # it did move


@pytest.mark.parametrize("condition", [1.0, 100.0])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("name", ["llama", "t5", "unet-sd15"])
def test_the_bound_follows_the_condition_number(name: str, dtype: torch.dtype, condition: float) -> None:
    toy = toy_checkpoint(name)
    result = found(toy, *moved(toy, dtype, condition=condition), condition=condition)
    assert result.is_equal, result.explain()


def test_errors_stay_well_inside_the_bound_over_many_draws(record_property: Callable[[str, object], None]) -> None:
    """Roundings are independent, so errors add up far below the worst case; a third leaves room for real networks."""
    toy = toy_checkpoint("llama")
    largest = 0.0
    for seed in range(20):
        for condition in (1.0, CONDITION):
            pair = moved(toy, torch.bfloat16, seed=seed, condition=condition)
            worst = found(toy, *pair, condition=condition, seed=seed).worst
            assert worst is not None
            largest = max(largest, worst.excess)
    record_property("largest error in units of the bound", largest)
    assert 0.01 < largest < 1 / 3


def test_a_checkpoint_equals_itself_exactly() -> None:
    for name in ("llama", "deepseek_v3"):
        toy = toy_checkpoint(name)
        result = found(toy, toy.tensors, toy.tensors, condition=1.0)
        assert result.is_equal
        assert {block.error for block in result.blocks} == {0.0}


@pytest.mark.parametrize(("finer", "coarser"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float16)])
def test_a_copy_in_a_coarser_dtype_equals_up_to_that_dtype(finer: torch.dtype, coarser: torch.dtype) -> None:
    toy = toy_checkpoint("qwen2")
    first, second = cast(toy.tensors, finer), cast(toy.tensors, coarser)
    outside = [name for name in toy.tensors if name not in body(toy)]
    second.update({name: first[name] for name in outside})
    for pair in ((first, second), (second, first)):
        assert found(toy, *pair, condition=1.0).is_equal
    as_stored = {name: tensor.to(finer) for name, tensor in second.items()}
    assert not found(toy, first, as_stored, condition=1.0).is_equal  # the control: nothing explains the rounding


def test_a_coarser_bias_counts_too() -> None:
    """Biases and gains move with the weights and are rounded where they are stored."""
    toy = toy_checkpoint("qwen2")
    first = {
        name: tensor.to(torch.bfloat16 if name.endswith("bias") else torch.float32)
        for name, tensor in toy.tensors.items()
    }
    second = transform_all(first, toy.architecture.symmetry, [whole_gauge(toy.architecture)])
    result = found(toy, first, second)
    assert result.is_equal, result.explain()


def test_a_layer_that_was_never_trained_equals_itself() -> None:
    toy = toy_checkpoint("gpt2")
    zeroed = {**toy.tensors, "transformer.h.0.attn.c_proj.weight": torch.zeros(48, 48)}
    assert found(toy, zeroed, zeroed).is_equal
    almost = {**zeroed, "transformer.h.0.attn.c_proj.weight": torch.full((48, 48), 1e-30)}
    assert not found(toy, zeroed, almost).is_equal
    assert not found(toy, almost, zeroed).is_equal


# --------------------------------------------------------------------------------------------- what is not equal


def only(space: Space, element: Element) -> Gauge:
    return fixed_gauge({space.name: space}, {space.name: element})


def space_of(toy: ToyCheckpoint, role: str, kind: str | None = None) -> Space:
    spaces = toy.architecture.symmetry.select(role).values()  # type: ignore[arg-type]
    return next(space for space in spaces if kind is None or space.group.kind == kind)


def as_if(toy: ToyCheckpoint, role: str, group: Group, kind: str | None = None) -> tuple[str, State]:
    """The network under an element of a group that its space does not have, and the block's name."""
    space = space_of(toy, role, kind)
    other = Space(space.name, space.role, group, space.blocks, space.size)
    gauge = only(space, sample(other, Stream.from_seed(3), CONDITION))
    (block,) = (block.name for block in toy.architecture.blocks if space.name.startswith(block.name + "."))
    return block, transform_all(toy.tensors, toy.architecture.symmetry, [gauge])


FORBIDDEN = {
    "any matrix under rotary positions": ("llama", "query_key", Group("general_linear"), None),
    "a diagonal under rotary positions": ("llama", "query_key", Group("diagonal"), None),
    "interleaved pairs where they are half-split": ("llama", "query_key", Group("rotary", "interleaved"), None),
    "half-split pairs where they are interleaved": ("gptj", "query_key", Group("rotary", "half"), "rotary"),
    "half-split pairs of latent attention": ("deepseek_v3", "query_key", Group("rotary", "half"), "rotary"),
    "free phases behind a norm": ("qwen3", "query_key", Group("rotary", "half"), "pair_sign"),
    "scales behind a norm": ("qwen3", "query_key", Group("pair_scale", "half"), "pair_sign"),
    "signs per pair behind a LayerNorm": (
        "cohere-qk-norm",
        "query_key",
        Group("pair_sign", "interleaved"),
        "block_sign",
    ),
    "scales through GELU": ("gpt2", "feed_forward", Group("diagonal"), "permutation"),
    "signs through ReLU": ("opt", "feed_forward", Group("diagonal"), "positive_diagonal"),
    "scales through a gate": ("llama", "feed_forward", Group("diagonal"), "permutation"),
}


@pytest.mark.parametrize("claim", FORBIDDEN)
def test_a_group_that_is_too_large_is_found_out(claim: str) -> None:
    name, role, group, kind = FORBIDDEN[claim]
    toy = toy_checkpoint(name)
    block, changed = as_if(toy, role, group, kind)
    assert_only_off(found(toy, toy.tensors, changed), block)


def assert_only_off(result: Equivalence, block: str) -> None:
    """One block is off, and the explanation says which."""
    assert not result.is_equal
    assert [error.name for error in result.blocks if not error.is_equal] == [block]
    assert result.worst is not None
    assert result.worst.name == block
    assert block in result.explain()
    assert "\n" not in result.explain()


def attention(toy: ToyCheckpoint, index: int = 0) -> str:
    return toy.architecture.attentions[index].name


def reordered_rows(tensor: Tensor, heads: int) -> Tensor:
    """The first two heads exchanged, heads lying one after another on the rows."""
    parts = list(tensor.chunk(heads))
    parts[:2] = parts[1], parts[0]
    return torch.cat(parts)


def exchange_heads(toy: ToyCheckpoint, names: Mapping[str, int], heads: int) -> State:
    """Exchange the first two heads on the given axis of each tensor."""
    changed = dict(toy.tensors)
    for name, axis in names.items():
        changed[name] = reordered_rows(changed[name].movedim(axis, 0), heads).movedim(0, axis).contiguous()
    return changed


def test_heads_may_change_places_only_together() -> None:
    toy = toy_checkpoint("llama")  # three key-value heads
    module = attention(toy)
    everywhere = {f"{module}.{side}_proj.weight": 0 for side in "qkv"} | {f"{module}.o_proj.weight": 1}
    assert found(toy, toy.tensors, exchange_heads(toy, everywhere, 3)).is_equal
    for left_out in everywhere:
        some = {name: axis for name, axis in everywhere.items() if name != left_out}
        assert_only_off(found(toy, toy.tensors, exchange_heads(toy, some, 3)), module)


def test_heads_under_alibi_may_not_change_places() -> None:
    toy = toy_checkpoint("bloom")
    module = attention(toy)
    names = {f"{module}.query_key_value.weight": 0, f"{module}.query_key_value.bias": 0, f"{module}.dense.weight": 1}
    assert_only_off(found(toy, toy.tensors, exchange_heads(toy, names, 6)), module)


def test_heads_under_a_shared_bias_change_places_with_it_in_every_layer() -> None:
    toy = toy_checkpoint("t5")
    stack = [block.name for block in toy.architecture.attentions if block.name.startswith("encoder")]
    one, other = ({f"{module}.{side}.weight": int(side == "o") for side in "qkvo"} for module in stack)
    bias = {toy.architecture.shared_heads[0].bias_tensor: 1}
    assert found(toy, toy.tensors, exchange_heads(toy, one | other | bias, 5)).is_equal
    assert_only_off(found(toy, toy.tensors, exchange_heads(toy, one, 5)), stack[0])
    assert_only_off(found(toy, toy.tensors, exchange_heads(toy, one | bias, 5)), stack[1])
    result = found(toy, toy.tensors, exchange_heads(toy, bias, 5))
    assert [block.name for block in result.blocks if not block.is_equal] == stack


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_one_head_of_another_network_is_found_out(dtype: torch.dtype) -> None:
    toy = toy_checkpoint("llama")
    module = attention(toy, 1)
    size = 8
    for side in "qkv":
        first, second = moved(toy, dtype)
        assert found(toy, first, second).is_equal
        weight = second[f"{module}.{side}_proj.weight"]
        weight[:size] = torch.from_numpy(Stream.from_seed(5).normal(size, 48)) / math.sqrt(48)
        assert_only_off(found(toy, first, second), module)


BIASES = {
    "queries": ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
    "keys under rotary positions": ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
    "values": ("qwen2", "model.layers.0.self_attn.v_proj.bias"),
    "a fused projection": ("gpt2", "transformer.h.0.attn.c_attn.bias"),
    "a feed-forward": ("gpt2", "transformer.h.0.mlp.c_fc.bias"),
    "a norm on queries": ("phi-qk-norm", "model.layers.0.self_attn.q_layernorm.bias"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BIASES)
def test_a_dropped_bias_is_found_out(case: str, dtype: torch.dtype) -> None:
    name, bias = BIASES[case]
    toy = toy_checkpoint(name)
    first = cast(toy.tensors, dtype)
    second = {**first, bias: torch.zeros_like(first[bias])}
    (block,) = (block.name for block in toy.architecture.blocks if bias.startswith(block.name))
    assert_only_off(found(toy, first, second, condition=1.0), block)


def test_a_key_bias_without_positions_is_invisible() -> None:
    """It adds one number to all scores of a query, which the softmax removes: equal is the right answer."""
    toy = toy_checkpoint("bert")
    bias = "bert.encoder.layer.0.attention.self.key.bias"
    assert found(toy, toy.tensors, {**toy.tensors, bias: torch.zeros_like(toy.tensors[bias])}).is_equal


GAINS = {
    "qwen3": "model.layers.1.self_attn.q_norm.weight",
    "gemma3": "model.layers.1.self_attn.k_norm.weight",
    "olmo2": "model.layers.1.self_attn.q_norm.weight",
    "phi-qk-norm": "model.layers.1.self_attn.k_layernorm.weight",
    "cohere-qk-norm": "model.layers.1.self_attn.q_norm.weight",
    "stablelm-qk-norm": "model.layers.1.self_attn.q_layernorm.norms.4.weight",
}


@pytest.mark.parametrize("name", GAINS)
def test_an_altered_norm_gain_is_found_out(name: str) -> None:
    toy = toy_checkpoint(name)
    gain = toy.tensors[GAINS[name]].clone()
    gain.view(-1)[3] *= 1.1
    assert_only_off(found(toy, toy.tensors, {**toy.tensors, GAINS[name]: gain}), "model.layers.1.self_attn")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "phi3", "deepseek_v3", "dinov2-swiglu", "t5", "unet-sd15"])
def test_one_percent_of_noise_on_any_weight_is_found_out(name: str) -> None:
    toy = toy_checkpoint(name)
    first, second = moved(toy)
    blocks = [toy.architecture.attentions[0], toy.architecture.feed_forwards[-1]]
    weights = [
        weight
        for weight, legs in toy.architecture.symmetry.legs.items()
        if first[weight].dim() == 2
        and any(leg.space.startswith(block.name + ".") for leg in legs for block in blocks)
        and "relative_attention_bias" not in weight
    ]
    assert len(weights) >= 4
    for position, weight in enumerate(weights):
        noise = torch.from_numpy(Stream.from_seed(position).normal(*second[weight].shape)).float()
        noisy = second[weight] + 0.01 * noise * second[weight].norm() / noise.norm()
        result = found(toy, first, {**second, weight: noisy})
        assert not result.is_equal, weight
        assert not result.altered


def test_half_a_gauge_is_found_out() -> None:
    toy = toy_checkpoint("vit")
    first, second = moved(toy)
    for side in ("query", "key", "value"):
        weight = f"vit.encoder.layer.0.attention.attention.{side}.weight"
        assert_only_off(found(toy, first, {**second, weight: first[weight]}), attention(toy))


def kernels() -> tuple[Architecture, State]:
    """Two kernels of three by three with a depthwise one, a norm's mean, and what weighs units between them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (5, 3, 3, 3), "bias": (5,), "kernel": (5, 1, 3, 3), "mean": (5,), "squeeze": (2, 5, 1, 1)}
    shapes["down"] = (4, 5, 3, 3)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    along = tuple(Heads(name, None, int(name == "squeeze"), 0, 0) for name in ("kernel", "mean", "squeeze"))
    block = FeedForward("mlp", 5, Heads("up", "bias", 0, 0, 0), Heads("down", None, 1, 0, 0), along=along)
    return Architecture("toy", (block,)), state


def test_tensors_along_hidden_units_follow_them() -> None:
    architecture, state = kernels()
    assert [space.group.kind for space in architecture.symmetry.spaces.values()] == ["permutation"]
    order = torch.tensor([3, 0, 4, 1, 2])
    element = Monomial(order[None], torch.ones(1, 5, dtype=torch.float64))
    gauge = fixed_gauge(architecture.symmetry.spaces, {"mlp.order": element})
    after = transform_all(state, architecture.symmetry, [gauge])
    assert not any(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert compare(source(state), source(after), architecture, condition=1.0, threads=1).is_equal
    for name in ("kernel", "mean", "squeeze"):
        left = {**after, name: state[name]}
        assert not compare(source(state), source(left), architecture, condition=1.0, threads=1).is_equal, name
    doubled = {**state, "kernel": 2 * state["kernel"]}
    assert not compare(source(state), source(doubled), architecture, condition=1.0, threads=1).is_equal


def test_a_larger_condition_number_than_announced_is_found_out() -> None:
    """In half precision the damage is real, and the bound is that of the number the owner asked for."""
    toy = toy_checkpoint("gpt2")
    result = found(toy, *moved(toy, torch.float16, condition=1e5), condition=1.0)
    assert not result.is_equal


def test_numbers_too_large_for_the_dtype_are_found_out() -> None:
    toy = toy_checkpoint("llama")
    tensors = cast(toy.tensors, torch.float16)
    weight = f"{attention(toy)}.q_proj.weight"
    tensors[weight] *= 60_000 / tensors[weight].abs().max()
    with_infinities = transform_all(tensors, toy.architecture.symmetry, [whole_gauge(toy.architecture)])
    assert with_infinities[weight].isinf().any()
    assert_only_off(found(toy, tensors, with_infinities), attention(toy))


# --------------------------------------------------------------------------------------------------- not a number


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "weight", ["self_attn.q_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight", "mlp.gate_proj.weight"]
)
def test_what_is_not_finite_is_never_equal_to_a_number(weight: str, value: float) -> None:
    toy = toy_checkpoint("qwen2")
    name = f"model.layers.1.{weight}"
    broken = toy.tensors[name].clone()
    broken.view(-1)[7] = value
    block = name.rsplit(".", 2)[0]
    for pair in ((toy.tensors, {**toy.tensors, name: broken}), ({**toy.tensors, name: broken}, toy.tensors)):
        assert_only_off(found(toy, *pair), block)
    if math.isnan(value):
        both = found(toy, {**toy.tensors, name: broken}, {**toy.tensors, name: broken})
        assert not both.is_equal  # a block that computes NaN is vouched for by nobody
        assert both.explain() == f"block {block} computes numbers that are not finite"


def test_a_nan_error_is_the_worst_of_all_wherever_it_stands() -> None:
    blocks = (BlockError("a", 2.0, 1.0), BlockError("b", math.nan, 1.0), BlockError("c", 1e9, 1.0))
    for order in (blocks, blocks[::-1], (blocks[1], blocks[0], blocks[2])):
        result = Equivalence(order, ())
        assert not result.is_equal
        assert result.worst is blocks[1]
    assert not BlockError("b", math.nan, 1.0).is_equal
    assert not BlockError("b", 1.0, math.nan).is_equal
    assert not BlockError("b", math.inf, 1.0).is_equal
    assert BlockError("b", 1.0, 1.0).is_equal
    assert Equivalence((), ()).worst is None


# ------------------------------------------------------------------------------------------ tensors outside blocks


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_an_altered_tensor_outside_the_blocks_is_named(name: str) -> None:
    toy = toy_checkpoint("llama")
    for change in (lambda x: x * (1 + 2e-7), lambda x: x + math.nan, lambda x: x[:-1], lambda x: -x):
        changed = {**toy.tensors, name: change(toy.tensors[name])}
        result = found(toy, toy.tensors, changed)
        assert result.altered == (name,)
        assert not result.is_equal
        assert result.explain() == f"tensor {name} differs outside the blocks a symmetry may change"
        left_out = compare(
            source(toy.tensors), source(changed), toy.architecture, condition=1.0, threads=1, blocks_only=True
        )
        assert left_out.is_equal


def test_several_altered_tensors_are_counted() -> None:
    toy = toy_checkpoint("llama")
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    changed = {**toy.tensors, **{name: toy.tensors[name] + 1 for name in names}}
    result = found(toy, toy.tensors, changed)
    assert sorted(result.altered) == sorted(names)
    assert "and 2 more differs" in result.explain()


def test_a_copy_is_a_copy_whatever_it_holds() -> None:
    """Outside the blocks numbers are compared and not computed with: a NaN kept in its place is no change."""
    toy = toy_checkpoint("llama")
    odd = {
        **toy.tensors,
        "lm_head.weight": torch.full((67, 48), math.nan),
        "model.norm.weight": torch.full((48,), -math.inf),
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(5),
    }
    assert found(toy, odd, odd).altered == ()
    moved_nan = odd["lm_head.weight"].clone()
    moved_nan[0, 0] = 0
    changes: State = {
        "lm_head.weight": moved_nan,
        "model.norm.weight": torch.full((48,), math.inf),
        "flags": torch.tensor([True, True]),
        "ids": torch.arange(5) + 1,
    }
    for name, tensor in changes.items():
        assert found(toy, odd, {**odd, name: tensor}).altered == (name,)


def test_other_dtypes_outside_the_blocks_are_compared_by_value() -> None:
    toy = toy_checkpoint("llama")
    rounded = {**toy.tensors, "model.norm.weight": toy.tensors["model.norm.weight"].bfloat16()}
    assert found(toy, toy.tensors, rounded).altered == ("model.norm.weight",)
    widened = {**rounded, "model.norm.weight": rounded["model.norm.weight"].double()}
    assert found(toy, rounded, widened).altered == ()


def test_weights_that_are_no_floats_are_refused() -> None:
    toy = toy_checkpoint("llama")
    name = f"{attention(toy)}.k_proj.weight"
    whole = {**toy.tensors, name: (100 * toy.tensors[name]).to(torch.int8)}
    with pytest.raises(UnsupportedArchitecture, match=rf"tensor {name} of whole is stored as I8; convert .*\.$"):
        compare(source(toy.tensors), source(whole, "whole"), toy.architecture, condition=1.0)


# ------------------------------------------------------------------------------------------------ how it is done


def test_the_seed_decides_the_inputs_and_threads_decide_nothing() -> None:
    toy = toy_checkpoint("deepseek_v3")
    first, second = (source(tensors) for tensors in moved(toy))
    results = [
        compare(first, second, toy.architecture, condition=CONDITION, threads=threads, seed=seed)
        for seed, threads in ((0, 1), (0, 2), (0, 8), (1, 1))
    ]
    assert results[0] == results[1] == results[2]
    assert all(one.error != other.error for one, other in zip(results[0].blocks, results[3].blocks, strict=True))


def test_progress_is_told_one_at_a_time_up_to_the_total() -> None:
    toy = toy_checkpoint("llama")
    told: list[tuple[str, int, int, str]] = []
    busy = threading.Lock()

    def report(stage: str, done: int, total: int, unit: str) -> None:
        assert busy.acquire(blocking=False)
        time.sleep(0.001)
        told.append((stage, done, total, unit))
        busy.release()

    compare(source(toy.tensors), source(toy.tensors), toy.architecture, condition=1.0, threads=4, progress=report)
    outside = [name for name in toy.tensors if name not in body(toy)]
    total = len(toy.architecture.blocks) + len(outside)
    assert told == [("verifying", done, total, "tensors") for done in range(1, total + 1)]


def test_errors_while_reading_are_raised() -> None:
    toy = toy_checkpoint("llama")
    incomplete = dict(toy.tensors)
    name = f"{attention(toy)}.v_proj.weight"
    del incomplete[name]
    with pytest.raises(Exception, match=name):
        found(toy, toy.tensors, incomplete)


# ------------------------------------------------------------------------------------------------- changed blocks


def test_blocks_that_a_gauge_leaves_alone_need_no_comparison() -> None:
    toy = toy_checkpoint("llama")
    spaces = list(toy.architecture.symmetry.select("query_key", "value_output"))
    reduced = changed_blocks(toy.architecture, spaces)
    assert reduced.blocks == toy.architecture.attentions
    assert changed_blocks(toy.architecture, []).blocks == ()
    one = changed_blocks(toy.architecture, ["model.layers.1.mlp.order"])
    assert [block.name for block in one.blocks] == ["model.layers.1.mlp"]


@pytest.mark.parametrize(("name", "space"), [("qwen3", "gain"), ("phi-qk-norm", "gain.0"), ("olmo2", "gain")])
def test_a_gauge_of_gains_alone_changes_its_block(name: str, space: str) -> None:
    toy = toy_checkpoint(name)
    module = attention(toy)
    assert [block.name for block in changed_blocks(toy.architecture, [f"{module}.query_key_{space}"]).blocks] == [
        module
    ]


def test_a_reduced_comparison_finds_the_same() -> None:
    toy = toy_checkpoint("t5")
    spaces = toy.architecture.symmetry.select("query_key", "value_output")
    gauge = sampled_gauge(spaces, Stream.from_seed(0), CONDITION)
    second = transform_all(toy.tensors, toy.architecture.symmetry, [gauge])
    name = toy.architecture.attentions[0].name + ".v.weight"
    for tensors in (second, {**second, name: -second[name]}):
        whole = found(toy, toy.tensors, tensors)
        reduced = compare(
            source(toy.tensors),
            source(tensors),
            changed_blocks(toy.architecture, list(spaces)),
            condition=CONDITION,
            threads=1,
            blocks_only=True,
        )
        assert set(reduced.blocks) <= set(whole.blocks)
        assert reduced.is_equal == whole.is_equal == (tensors is second)


def test_a_gauge_element_of_minus_one_is_no_change_of_the_function() -> None:
    """Signs of whole heads, everywhere at once, in every dtype exactly: the error is zero."""
    toy = toy_checkpoint("qwen2")
    tensors = cast(toy.tensors, torch.bfloat16)
    space = space_of(toy, "value_output")
    minus = Monomial(
        torch.arange(space.size).expand(space.blocks, -1), -torch.ones(space.blocks, space.size, dtype=torch.float64)
    )
    second = transform_all(tensors, toy.architecture.symmetry, [only(space, minus)])
    result = found(toy, tensors, second, condition=1.0)
    assert {block.error for block in result.blocks} == {0.0}
    assert not torch.equal(second[f"{attention(toy)}.v_proj.weight"], tensors[f"{attention(toy)}.v_proj.weight"])
