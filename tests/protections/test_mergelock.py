"""MergeLock: a reproducible secret gauge on every attention block, bounded as asked, that really moves the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import UsageError
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Dense
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.groups import contains
from unmergeable.protections import PROTECTIONS, ExactProtection, ProtectionRequirements
from unmergeable.protections.mergelock import MergeLock
from unmergeable.randomness import Stream
from unmergeable.settings import configure, settings_of
from zoo import TOYS

EPSILON = torch.finfo(torch.float64).eps


def protected(toy: ToyCheckpoint, *, seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    gauge = MergeLock(**settings).gauge(toy.architecture, Stream.from_seed(seed))
    return transform_all(toy.tensors, toy.architecture.symmetry, [gauge])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("condition", [1, 1.0, 4.0, 1000.0, "2.5"])
def test_conditions_from_one_to_a_thousand_are_taken(condition: object) -> None:
    assert configure(MergeLock, {"condition": condition}).condition == float(str(condition))


@pytest.mark.parametrize("condition", [0.999, 0, -4, 1000.1, math.inf, math.nan, "nan", "inf"])
def test_other_conditions_are_refused(condition: object) -> None:
    with pytest.raises(UsageError, match=r"^mergelock: condition must lie between 1 and 1000, not .*\.$"):
        configure(MergeLock, {"condition": condition})


def test_it_is_registered_as_what_it_is() -> None:
    assert PROTECTIONS["mergelock"] is MergeLock
    protection: ExactProtection = MergeLock()
    assert protection.requirements() == ProtectionRequirements(exact=True, needs=("key",), stage="basis")
    assert settings_of(protection) == {"condition": 4.0, "cross_attention": True, "as_published": False}
    assert "\n" not in protection.summary


# ----------------------------------------------------------------------------------------------------------- spaces


@pytest.mark.parametrize("name", TOYS)
def test_every_attention_block_is_covered_on_both_sides(name: str) -> None:
    architecture = toy_checkpoint(name).architecture
    spaces = MergeLock().spaces(architecture)
    for block in architecture.attentions:
        own = [space for space in spaces.values() if space.name.startswith(block.name + ".")]
        assert {space.role for space in own} == {"query_key", "value_output"}, block.name
    assert all(space.epsilon == 0 for space in spaces.values())  # exact as it stands
    moved = set(architecture.symmetry.tensors_of(spaces))
    for feed_forward in architecture.feed_forwards:
        assert feed_forward.up.weight not in moved


@pytest.mark.parametrize("name", ["t5", "flan-t5", "unet-sd15"])
def test_cross_attention_can_be_left_alone(name: str) -> None:
    toy = toy_checkpoint(name)
    cross = [block.name + "." for block in toy.architecture.attentions if block.is_cross]
    assert cross
    left, whole = protected(toy, cross_attention=False), protected(toy)
    for tensor in toy.tensors:
        if any(tensor.startswith(module) for module in cross):
            assert torch.equal(left[tensor], toy.tensors[tensor])
        else:  # the rest does not depend on whether the cross-attention is there
            assert torch.equal(left[tensor], whole[tensor])
    assert any(not torch.equal(whole[tensor], left[tensor]) for tensor in toy.tensors)


def test_the_rest_never_moves() -> None:
    toy = toy_checkpoint("llama")
    moved = {name for name, tensor in protected(toy).items() if not torch.equal(tensor, toy.tensors[name])}
    assert moved == {
        f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in range(2) for side in "qkvo"
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ gauge


@pytest.mark.parametrize("name", TOYS)
def test_elements_belong_to_their_groups_within_the_condition(name: str) -> None:
    architecture = toy_checkpoint(name).architecture
    for condition in (1.0, 4.0, 1000.0):
        gauge = MergeLock(condition=condition).gauge(architecture, Stream.from_seed(0))
        assert list(gauge) == list(MergeLock().spaces(architecture))
        assert all(contains(space, gauge[name]) for name, space in gauge.spaces.items())
        assert gauge.condition() <= condition * (1 + 64 * EPSILON)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "cohere-qk-norm", "deepseek_v3", "t5"])
def test_condition_one_gives_isometries(name: str) -> None:
    architecture = toy_checkpoint(name).architecture
    gauge = MergeLock(condition=1).gauge(architecture, Stream.from_seed(0))
    for space in gauge:
        matrix = gauge[space].matrix()
        neutral = torch.eye(matrix.shape[1], dtype=torch.float64)
        assert (matrix.mT @ matrix - neutral).abs().max() <= 16 * matrix.shape[1] * EPSILON
    # The control, and what the setting buys: without it weights keep their singular values.
    assert MergeLock(condition=2).gauge(architecture, Stream.from_seed(0)).condition() > 1.1


@pytest.mark.parametrize("name", ["llama", "stablelm-qk-norm", "unet-sd15"])
def test_a_gauge_is_reproducible_and_secret_streams_differ(name: str) -> None:
    toy = toy_checkpoint(name)
    first, again, other = protected(toy, seed=1), protected(toy, seed=1), protected(toy, seed=2)
    assert all(torch.equal(first[tensor], again[tensor]) for tensor in first)
    touched = toy.architecture.symmetry.tensors_of(MergeLock().spaces(toy.architecture))
    assert touched
    assert all(not torch.equal(first[tensor], other[tensor]) for tensor in touched)


def test_every_head_and_layer_has_its_own_element() -> None:
    architecture = toy_checkpoint("gpt2").architecture
    gauge = MergeLock().gauge(architecture, Stream.from_seed(0))
    blocks = [tuple(block.flatten().tolist()) for space in gauge for block in gauge[space].matrix()]
    assert len(blocks) == len(set(blocks)) == 2 * 2 * 6  # layers, sides, heads


def test_the_element_is_a_rotation_a_permutation_and_a_diagonal() -> None:
    """A = R P D: the columns of A are orthogonal, and their lengths are the diagonal in another order."""
    architecture = toy_checkpoint("gpt2").architecture
    gauge = MergeLock(condition=9).gauge(architecture, Stream.from_seed(0))
    for space in gauge:
        matrix = gauge[space].matrix()
        gram = matrix.mT @ matrix
        squares = torch.diagonal(gram, dim1=1, dim2=2)
        assert (gram - torch.diag_embed(squares)).abs().max() <= 64 * EPSILON * 9
        # D lies between 1/3 and 3, so its squares between 1/9 and 9.
        assert (1 - 64 * EPSILON) / 9 <= squares.min() < squares.max() <= 9 * (1 + 64 * EPSILON)


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", TOYS)
def test_more_than_15_percent_of_the_tensors_really_move(name: str) -> None:
    toy = toy_checkpoint(name)
    after = protected(toy, seed=3)
    touched = toy.architecture.symmetry.tensors_of(MergeLock().spaces(toy.architecture))
    moved = [tensor for tensor in toy.tensors if not torch.equal(after[tensor], toy.tensors[tensor])]
    assert set(moved) == set(touched)
    assert len(moved) > 0.15 * len(toy.tensors)
    # Not by a rounding: every attention weight goes further than a fine-tune would ever take it.
    for block in toy.architecture.attentions:
        for heads in (block.value, block.output):
            assert difference(after[heads.weight], toy.tensors[heads.weight]) > 0.1, heads.weight


@pytest.mark.parametrize("name", TOYS)
def test_the_function_stays(name: str) -> None:
    toy = toy_checkpoint(name)
    first, second = (MemorySource(tensors, toy.config) for tensors in (toy.tensors, protected(toy, seed=4)))
    found = compare(first, second, toy.architecture, condition=4.0, threads=1)
    assert found.is_equal, found.explain()


def test_the_published_form_breaks_rotary_attention() -> None:
    """The control of the above: what is drawn on GPT-2 is too much for Llama, whose queries and keys are turned."""
    toy = toy_checkpoint("llama")
    gauge = MergeLock(as_published=True).gauge(toy.architecture, Stream.from_seed(4))
    assert all(isinstance(gauge[name], Dense) for name in gauge)
    assert any("not exact under rotary positions" in space.limit for space in gauge.spaces.values())
    first, second = (MemorySource(t, {}) for t in (toy.tensors, protected(toy, seed=4, as_published=True)))
    assert not compare(first, second, toy.architecture, condition=4.0, threads=1).is_equal
    # Without positions inside attention both forms are one.
    toy = toy_checkpoint("gpt2")
    ours, published = protected(toy, seed=4), protected(toy, seed=4, as_published=True)
    assert all(torch.equal(ours[name], published[name]) for name in toy.tensors)


def test_the_published_form_leaves_cross_attention_alone() -> None:
    toy = toy_checkpoint("t5")
    left, published = protected(toy, cross_attention=False), protected(toy, as_published=True)
    assert all(torch.equal(left[name], published[name]) for name in toy.tensors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "t5", "vit"])
def test_averaging_with_the_unprotected_weights_is_no_average_of_functions(name: str) -> None:
    """Why a merge collapses: halfway between two bases, scores and values are neither one's nor the other's."""
    toy = toy_checkpoint(name)
    far = protected(toy, seed=5)
    halfway = {tensor: (toy.tensors[tensor] + far[tensor]) / 2 for tensor in toy.tensors}
    first, second = MemorySource(toy.tensors, {}), MemorySource(halfway, {})
    found = compare(first, second, toy.architecture, condition=4.0, threads=1, blocks_only=True)
    errors = {block.name: block.error for block in found.blocks}
    assert all(errors[block.name] > 0.3 for block in toy.architecture.attentions)
    # The control: two unprotected copies average to themselves.
    assert compare(first, first, toy.architecture, condition=1.0, threads=1).is_equal
