from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from polynomials.written import Original, load_written, original, relative, write
from toy_checkpoints import toy_checkpoint
from unmergeable.architecture import Architecture, Space
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.act import leg_view, transform_all
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.groups import contains
from unmergeable.protections.mergebarrier import MergeBarrier, flip, head_moments
from zoo import load_toy, outputs

ATTENTION = MergeBarrier(parts="attention")
FLIPPABLE = ("llama", "llama-bias-tied-mqa", "qwen2", "qwen3", "gemma2", "gpt2", "opt", "bert", "vit", "t5", "bloom")


def protected(name: str, method: MergeBarrier = ATTENTION) -> tuple[Any, MemorySource, MemorySource]:
    toy = toy_checkpoint(name)
    source = MemorySource({key: tensor.double() for key, tensor in toy.tensors.items()}, toy.config)
    moved = transform_all(source.tensors, toy.architecture.symmetry, [method.gauge(source, toy.architecture)])
    return toy, source, MemorySource(moved, toy.config)


def row_norm(source: MemorySource, other: MemorySource, toy: Any, space: Space) -> torch.Tensor:
    """Squared distance over what lies in a space, block by block."""
    total = torch.zeros(space.blocks, dtype=torch.float64)
    for name in toy.architecture.symmetry.tensors_of({space.name}):
        for leg in toy.architecture.symmetry.legs[name]:
            if leg.space == space.name and leg.variance != "gain":
                apart = source.tensors[name] - other.tensors[name]
                total += leg_view(apart, leg, space).square().movedim(1, 0).flatten(1).sum(1)
    return total


@pytest.mark.parametrize("name", FLIPPABLE)
def test_attention_part_keeps_the_function(name: str) -> None:
    toy, source, moved = protected(name)
    found = compare(source, moved, toy.architecture, condition=1.0)

    assert found.is_equal, found.explain()
    for space in ATTENTION.spaces(toy.architecture).values():
        element = flip(space, head_moments(source, toy.architecture.symmetry, space), 0)
        assert contains(space, element)
        # Control: the weights moved, in every head.
        assert bool((row_norm(source, moved, toy, space) > 0).all())


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_moves_the_weights_as_far_as_k_directions_can(name: str, top_k: int) -> None:
    """||Q' - Q||^2 + ||K' - K||^2 = 4 (sum of the k largest eigenvalues of M), and no other k directions do more."""
    toy, source, moved = protected(name, MergeBarrier(parts="attention", top_k=top_k))
    for space in ATTENTION.spaces(toy.architecture).values():
        moments = head_moments(source, toy.architecture.symmetry, space)
        largest = torch.linalg.eigvalsh(moments)[:, -top_k:].sum(1)
        distance = row_norm(source, moved, toy, space)
        assert torch.allclose(distance, 4 * largest, rtol=1e-12)

        generator = torch.Generator().manual_seed(0)
        other = torch.linalg.qr(
            torch.randn(space.blocks, space.size, top_k, generator=generator, dtype=torch.float64)
        ).Q
        assert bool((4 * (other.mT @ moments @ other).diagonal(dim1=1, dim2=2).sum(1) < distance).all())


def test_rotary_pairs_of_largest_energy_turn_by_pi() -> None:
    _, source, moved = protected("llama", MergeBarrier(parts="attention", top_k=2))
    query = "model.layers.0.self_attn.q_proj.weight"
    before, after = (member.tensors[query].view(6, 8, 48) for member in (source, moved))
    key = source.tensors["model.layers.0.self_attn.k_proj.weight"].view(3, 8, 48)
    for group in range(3):
        rows = torch.cat([before[2 * group], before[2 * group + 1], key[group]], dim=1).square().sum(1)
        energy = rows[:4] + rows[4:]
        flipped = [int(pair) for pair in energy.topk(2).indices]
        signs = torch.ones(8, 1, dtype=torch.float64)
        signs[[*flipped, *(pair + 4 for pair in flipped)]] = -1
        for head in (2 * group, 2 * group + 1):
            assert torch.equal(after[head], signs * before[head])


def test_published_form_breaks_rotary_attention() -> None:
    """The dense P commutes with no rotation of frequency pairs: kept as a setting, and shown to change the function."""
    toy, source, moved = protected("llama", MergeBarrier(parts="attention", as_published=True))
    assert not compare(source, moved, toy.architecture, condition=1.0).is_equal
    # Without positions inside attention both forms are one.
    toy, source, moved = protected("gpt2", MergeBarrier(parts="attention", as_published=True))
    assert compare(source, moved, toy.architecture, condition=1.0).is_equal


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "vit"])
def test_applying_it_again_undoes_it(name: str) -> None:
    """Why it is no secret: M is the same before and after, so the protected file gives P away."""
    toy, source, moved = protected(name)
    again = transform_all(moved.tensors, toy.architecture.symmetry, [ATTENTION.gauge(moved, toy.architecture)])

    for key, tensor in source.tensors.items():
        assert torch.allclose(again[key], tensor, rtol=0, atol=1e-12 * float(tensor.abs().max()))


def test_a_flip_of_all_directions_is_refused() -> None:
    llama, gpt2 = toy_checkpoint("llama").architecture, toy_checkpoint("gpt2").architecture
    with pytest.raises(UsageError, match=r"top_k=4 is not below the 4 directions of model\.layers\.0\.self_attn"):
        MergeBarrier(top_k=4).spaces(llama)
    with pytest.raises(UsageError, match="top_k=8 is not below the 8 directions"):
        MergeBarrier(top_k=8).spaces(gpt2)
    MergeBarrier(top_k=7).spaces(gpt2)  # control
    with pytest.raises(UsageError, match="at least 1"):
        MergeBarrier(top_k=-1).validate()
    with pytest.raises(UsageError, match="mergebarrier: order must lie between 1 and 32, not 0"):
        MergeBarrier(order=0).validate()
    assert MergeBarrier(parts="ffn").spaces(gpt2) == {}


def test_an_architecture_without_a_flip_is_refused() -> None:
    with pytest.raises(BadInput, match="no head of a stablelm model can be flipped; use parts=ffn"):
        ATTENTION.spaces(Architecture(family="stablelm", blocks=()))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def build(name: str) -> Original:
        return original(name, tmp_path_factory.mktemp(name) / "original")

    return build


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_parts_together_are_the_feed_forward_part_alone(
    name: str, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention part is exact: with and without it the networks compute the same, up to rounding."""
    import transformers.dynamic_module_utils as loading

    monkeypatch.setattr(loading, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = toy(name)
    results = {}
    for parts in ("both", "ffn"):
        planned = MergeBarrier(parts=parts).rewriting(model.source, model.architecture, model.ranges)  # type: ignore[arg-type]
        results[parts] = load_written(write(tmp_path / parts, planned))
    both, alone = results["both"], results["ffn"]

    assert relative(outputs(both, model.toy), outputs(alone, model.toy)) <= 256 * 2.0**-24
    assert (
        relative(outputs(alone, model.toy), outputs(load_toy(model.folder, model.toy), model.toy)) > 10 * 256 * 2.0**-24
    )
    key = "layers.0.self_attn.q_proj.weight" if name == "llama" else "h.0.attn.c_attn.weight"
    assert not torch.equal(both.base_model.get_parameter(key), alone.base_model.get_parameter(key))


def test_published_form_takes_all_hidden_units(toy: Any) -> None:
    model = toy("llama")
    for method, units in ((MergeBarrier(), 76), (MergeBarrier(as_published=True), 80)):
        section = method.rewriting(model.source, model.architecture, model.ranges).section
        assert {place.units for place in section.feed_forwards} == {units}
        assert (section.basis, section.order) == ("hermite", 8)
