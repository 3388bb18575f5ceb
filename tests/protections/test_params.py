"""PaRaMS: the order furthest from the base, with proof; scales in their range, tied where positions tie them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import unmergeable
from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.assignment import best_assignment
from unmergeable.gauge.elements import pair_indices
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.gauge import Gauge, undo
from unmergeable.progress import silent
from unmergeable.protections import ExactProtection, LargestGauge, MergeLock, PaRaMS, Weights
from unmergeable.protections.exact import ExactSequence
from unmergeable.protections.params import NEAR, furthest_order
from unmergeable.randomness import Stream
from unmergeable.settings import configure

BLOCK = "model.layers.0.mlp"


def fine_tuned(toy: ToyCheckpoint, size: float = 0.05) -> dict[str, Tensor]:
    return {
        name: tensor + size * tensor.std() * torch.from_numpy(Stream.from_seed(9).child(name).normal(*tensor.shape))
        for name, tensor in toy.tensors.items()
    }


def orders(toy: ToyCheckpoint, expert: dict[str, Tensor]) -> dict[str, Tensor]:
    return PaRaMS().orders(toy.architecture, MemorySource(expert), MemorySource(toy.tensors), silent)


def gauge(toy: ToyCheckpoint, expert: dict[str, Tensor], protection: PaRaMS) -> Gauge:
    weights = Weights(MemorySource(expert), orders(toy, expert))
    (found,) = protection.gauges(toy.architecture, Stream.from_seed(1), weights)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"smallest": 0},
        {"smallest": 2, "largest": 1},
        {"largest": math.inf},
        {"smallest": math.nan},
        {"attention": False, "feed_forward": False},
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^params: .*\.$"):
        configure(PaRaMS, settings)


def test_no_order_is_further() -> None:
    cost = torch.from_numpy(Stream.from_seed(0).normal(6, 6)).float()
    best = min(
        sum(float(cost[i, place]) for i, place in enumerate(order)) for order in itertools.permutations(range(6))
    )
    found = furthest_order(cost.clone(), gap=1e-4)
    assert sorted(found.tolist()) == list(range(6))
    rounding = 36 * torch.finfo(torch.float32).eps * 6
    assert best - rounding <= float(cost.gather(1, found[:, None]).sum()) <= best + 1e-4 + rounding


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "mixtral"])
def test_the_distance_to_the_base_is_as_large_as_an_order_can_make_it(name: str) -> None:
    toy = toy_checkpoint(name)
    expert = {key: tensor.float() for key, tensor in fine_tuned(toy).items()}
    symmetry = toy.architecture.symmetry
    alone = PaRaMS(attention=False)
    spaces = alone.spaces(toy.architecture)
    assert spaces
    tensors = symmetry.tensors_of(spaces)

    def distance(after: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((after[key] - toy.tensors[key]).square().sum()) for key in tensors))

    furthest = distance(transform_all(expert, symmetry, [gauge(toy, expert, alone)]))
    assert furthest > 10 * distance(expert)
    for seed in range(5):  # the control: orders at random lie nearer
        drawn = Weights(
            MemorySource(expert),
            {key: torch.from_numpy(Stream.from_seed(seed).permutations(1, s.size))[0] for key, s in spaces.items()},
        )
        (random,) = alone.gauges(toy.architecture, Stream.from_seed(1), drawn)
        assert distance(transform_all(expert, symmetry, [random])) < furthest


def test_orders_look_at_all_that_belongs_to_a_unit() -> None:
    """Rows of gate and up with their biases, and columns of down: the cost the order minimises, from its definition."""
    toy = toy_checkpoint("llama-bias-tied-mqa")
    expert = fine_tuned(toy)

    def units(tensors: dict[str, Tensor]) -> Tensor:
        columns = [tensors[f"{BLOCK}.{part}_proj.{kind}"] for part in ("gate", "up") for kind in ("weight", "bias")]
        parts = [column.reshape(len(column), -1) for column in columns]
        return torch.cat([*parts, tensors[f"{BLOCK}.down_proj.weight"].T], dim=1).double()

    base, ours = units(dict(toy.tensors)), units(expert)
    furthest = ours[best_assignment(-base @ ours.T)]
    found = ours[orders(toy, expert)[f"{BLOCK}.order"]]
    squares = float(base.square().sum() + ours.square().sum())

    def distance(units: Tensor) -> float:
        return float((base - units).square().sum())

    # What is promised, and float32 inner products over a few dozen numbers, whose errors count twice.
    below = distance(furthest) - distance(found)
    assert -1e-12 * squares <= below <= (NEAR + 2 * 64 * torch.finfo(torch.float32).eps) * squares
    # The control: the order of one part of the units is not good enough.
    rows = len(toy.tensors[f"{BLOCK}.gate_proj.weight"][0])
    partly = ours[best_assignment(-base[:, :rows] @ ours[:, :rows].T)]
    assert distance(furthest) - distance(partly) > 1e-3 * squares


def test_scales_lie_in_their_range_and_pairs_share_one() -> None:
    toy = toy_checkpoint("llama")
    found = gauge(toy, dict(toy.tensors), PaRaMS(smallest=0.5, largest=2.0))
    for space in found:
        if found.spaces[space].role == "feed_forward":
            continue
        matrix = found[space].matrix()
        entries = torch.diagonal(matrix, dim1=1, dim2=2)
        assert torch.equal(matrix, torch.diag_embed(entries))
        assert float(entries.min()) >= 0.5
        assert float(entries.max()) <= 2.0
        assert float(entries.max() / entries.min()) > 2
        if found.spaces[space].role == "query_key":
            first, second = pair_indices(found.spaces[space].size, "half")
            assert torch.equal(entries[:, first], entries[:, second])
        else:
            assert len(torch.unique(entries)) == entries.numel()


def test_the_published_form_breaks_rotary_attention() -> None:
    """A number of its own for every coordinate: no symmetry where positions turn pairs of them."""
    for name, is_equal in (("llama", False), ("gpt2", True)):
        toy = toy_checkpoint(name)
        expert = {key: tensor.double() for key, tensor in fine_tuned(toy).items()}
        source = MemorySource(expert)
        published = gauge(toy, expert, PaRaMS(as_published=True))
        ours = gauge(toy, expert, PaRaMS())
        moved = [MemorySource(transform_all(expert, toy.architecture.symmetry, [one])) for one in (published, ours)]
        found = [compare(source, other, toy.architecture, condition=1.0, threads=1).is_equal for other in moved]
        assert found == [is_equal, True]
    # The public code's seed is not used: another secret, other scales.
    toy = toy_checkpoint("gpt2")
    weights = Weights(MemorySource(dict(toy.tensors)), orders(toy, dict(toy.tensors)))
    scales = [PaRaMS(as_published=True).gauges(toy.architecture, Stream.from_seed(seed), weights)[0] for seed in (0, 1)]
    space = next(name for name in scales[0] if scales[0].spaces[name].role == "query_key")
    assert not torch.equal(scales[0][space].matrix(), scales[1][space].matrix())


def test_gains_stored_less_one_stay() -> None:
    """A gain of 0.05 stored as -0.95 has lost its digits in bfloat16."""
    toy = toy_checkpoint("gemma3")
    moved = toy.architecture.symmetry.tensors_of(PaRaMS().spaces(toy.architecture))
    assert not set(moved) & set(toy.architecture.symmetry.gain_offset)
    assert set(toy_checkpoint("qwen3").architecture.symmetry.tensors_of(
        PaRaMS().spaces(toy_checkpoint("qwen3").architecture)
    )) & {"model.layers.0.self_attn.q_norm.weight"}  # fmt: skip


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    toy = toy_checkpoint("llama")
    broken = fine_tuned(toy)
    broken[f"{BLOCK}.down_proj.weight"][1, 2] = math.nan
    with pytest.raises(BadInput, match=rf"tensor {BLOCK}\..* holds NaN or infinity"):
        orders(toy, broken)


def test_weights_whose_squares_are_no_numbers_are_refused() -> None:
    """A gap of infinity would call any order near."""
    toy = toy_checkpoint("llama")
    large = {name: tensor.clone() for name, tensor in toy.tensors.items()}  # the expert only: products stay finite
    large[f"{BLOCK}.down_proj.weight"][1, 2] = 1e30
    with pytest.raises(BadInput, match=rf"tensor {BLOCK}\..* holds NaN or infinity"):
        orders(toy, large)


def test_units_that_are_all_zero_have_an_order() -> None:
    toy = toy_checkpoint("llama")
    empty = {name: torch.zeros_like(tensor) if BLOCK in name else tensor for name, tensor in toy.tensors.items()}
    found = PaRaMS().orders(toy.architecture, MemorySource(empty), MemorySource(empty), silent)
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in found.values())


def test_undoing_restores() -> None:
    toy = toy_checkpoint("qwen2")
    expert = fine_tuned(toy)
    symmetry = toy.architecture.symmetry
    found = gauge(toy, expert, PaRaMS())
    restored = transform_all(transform_all(expert, symmetry, [found]), symmetry, undo([found]))
    for name, tensor in expert.items():
        # Scales of 400 to 1 and back, each rounded once.
        assert (restored[name] - tensor).abs().max() <= 8 * torch.finfo(torch.float64).eps * tensor.abs().max()


def condition(*methods: ExactProtection) -> float:
    return ExactSequence(methods).condition


def test_a_diagonal_counts_once_something_mixes_what_it_scaled() -> None:
    """Alone each weight is rounded once; next to a dense matrix rounding grows with both condition numbers."""
    assert condition(PaRaMS()) == 1
    assert condition(PaRaMS(), MergeLock()) == condition(MergeLock(), PaRaMS()) == 20 / 0.05 * 4
    assert condition(PaRaMS(attention=False), LargestGauge(condition=3)) == 3
    assert condition(PaRaMS(), LargestGauge(quantisation_friendly=True)) == 20 / 0.05


def test_kept_orders_and_scales_keep_what_is_rounded_together() -> None:
    """The order is the furthest of those that keep groups; scales are near one, and one for a group of columns."""
    size = 64
    generator = torch.Generator().manual_seed(0)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": size,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 16,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (16, 64), "model.norm.weight": (64,),
        "model.layers.0.input_layernorm.weight": (64,), "model.layers.0.post_attention_layernorm.weight": (64,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": (size, 64), "model.layers.0.mlp.up_proj.weight": (size, 64),
        "model.layers.0.mlp.down_proj.weight": (64, size),
    }  # fmt: skip
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    expert = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    moved: dict[str, tuple[Tensor, float]] = {}
    for quantisation in ("kept", "free"):
        settings = {"quantisation": quantisation, "attention": False}
        released, key = unmergeable.protect_state_dict(
            expert, config, method="params", settings=settings, base=base, seed=1
        )
        (order,) = (torch.tensor(order) for order in key.orders.values())
        distance = sum(float((released[name] - base[name]).square().sum()) for name in base if "mlp" in name)
        moved[quantisation] = order, distance
    near = sum(float((expert[name] - base[name]).square().sum()) for name in base if "mlp" in name)
    for group in (16, 32, 64):
        origin = moved["kept"][0].view(-1, group) // group
        assert bool((origin == origin[:, :1]).all())
        assert group == 64 or not bool((moved["free"][0].view(-1, group) // group == origin).all())
    assert 100 * near < moved["kept"][1] <= moved["free"][1], "further than the expert, not as far as without a bound"

    released, _ = unmergeable.protect_state_dict(
        expert, config, method="params", settings={"quantisation": "kept", "feed_forward": False}, base=base, seed=1
    )
    ratio = released["model.layers.0.self_attn.o_proj.weight"] / expert["model.layers.0.self_attn.o_proj.weight"]
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-5)
    rows = released["model.layers.0.self_attn.q_proj.weight"] / expert["model.layers.0.self_attn.q_proj.weight"]
    assert float(rows[:, 0].std()) > 0.1
    assert 0.5 - 1e-6 <= float(rows.min()) <= float(rows.max()) <= 2 + 1e-6
