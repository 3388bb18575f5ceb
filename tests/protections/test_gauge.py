"""The largest gauge: every part and nothing else, rotations where they are allowed, gains that stay, one rounding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import unmergeable
from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Dense, Orthogonal
from unmergeable.gauge.gauge import Gauge, undo
from unmergeable.gauge.groups import contains
from unmergeable.protections import LargestGauge, Weights
from unmergeable.randomness import Stream
from unmergeable.settings import configure
from zoo import TOYS

EPSILON = torch.finfo(torch.float64).eps
PARTS = ("attention", "heads", "feed_forward", "experts", "norms", "residual")


def gauges(toy: ToyCheckpoint, *, seed: int = 0, tensors: Any = None, **settings: Any) -> tuple[Gauge, ...]:
    weights = Weights(MemorySource(toy.tensors if tensors is None else tensors))
    return LargestGauge(**settings).gauges(toy.architecture, Stream.from_seed(seed), weights)


def moved(toy: ToyCheckpoint, **settings: Any) -> dict[str, Tensor]:
    return transform_all(toy.tensors, toy.architecture.symmetry, gauges(toy, **settings))


@pytest.mark.parametrize(
    "settings",
    [{"condition": 0.5}, {"condition": math.nan}, dict.fromkeys(PARTS, False), {"untie": True, "residual": False}],
)
def test_settings_without_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^gauge: .*\.$"):
        configure(LargestGauge, settings)


@pytest.mark.parametrize("name", TOYS)
def test_every_element_belongs_to_its_group_within_the_bound(name: str) -> None:
    toy = toy_checkpoint(name)
    for friendly in (False, True):
        for gauge in gauges(toy, quantisation_friendly=friendly):
            for space in gauge:
                assert contains(gauge.spaces[space], gauge[space])
        assert gauges(toy, quantisation_friendly=friendly)[0].condition() <= (1 if friendly else 4) * (1 + 64 * EPSILON)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_moves_only_its_own(part: str) -> None:
    toy = toy_checkpoint("deepseek_v3" if part == "experts" else "llama")
    alone = {name: name == part for name in PARTS}
    spaces = LargestGauge(**alone).spaces(toy.architecture)
    roles = {space.role for space in spaces.values()}
    assert roles == {"attention": {"query_key", "value_output"}, "norms": {"norm"}}.get(part, {part})
    touched = set(toy.architecture.symmetry.tensors_of(spaces))
    after = moved(toy, **alone)
    assert {name for name, tensor in after.items() if not torch.equal(tensor, toy.tensors[name])} <= touched
    # The control: with everything on, more moves. The stream alone is everything; gains stay where it is rotated.
    every = set(toy.architecture.symmetry.tensors_of(LargestGauge().spaces(toy.architecture)))
    assert part in {"residual", "norms"} or touched < every


def test_a_part_the_architecture_has_not_is_refused_when_alone() -> None:
    with pytest.raises(BadInput, match="none of the parts that are on"):
        LargestGauge(**{name: name == "experts" for name in PARTS}).spaces(toy_checkpoint("llama").architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotating_leaves_the_stored_gains_as_they_are(dtype: torch.dtype) -> None:
    """So that restoring needs no list of what was folded away; to the bit, as the rounding of g (1/g) g."""
    toy = toy_checkpoint("qwen3")
    tensors = {name: tensor.to(dtype) for name, tensor in toy.tensors.items()}
    after = transform_all(tensors, toy.architecture.symmetry, gauges(toy, tensors=tensors))
    for norm in toy.architecture.residuals[0].norms:
        assert torch.equal(after[norm.gain], tensors[norm.gain])
    embedding = toy.architecture.residuals[0].axes[0].tensor
    assert not torch.equal(after[embedding], tensors[embedding])
    # The key and the protected file give the same gauges again.
    again = gauges(toy, tensors=after)
    restored = transform_all(after, toy.architecture.symmetry, undo(again))
    unit = torch.finfo(dtype).eps
    for name, tensor in tensors.items():
        assert (restored[name] - tensor).double().norm() <= 16 * unit * tensor.double().norm(), name


def test_a_gain_of_zero_cannot_be_moved_back() -> None:
    toy = toy_checkpoint("llama")
    broken = {**toy.tensors, "model.norm.weight": toy.tensors["model.norm.weight"].clone()}
    broken["model.norm.weight"][3] = 0
    with pytest.raises(BadInput, match=r"tensor model\.norm\.weight .* set residual=false"):
        gauges(toy, tensors=broken)
    assert len(gauges(toy, tensors=broken, residual=False)) == 1


def test_what_is_quantisation_friendly_holds_no_dense_matrix_but_rotations() -> None:
    toy = toy_checkpoint("llama")
    for gauge in (gauges(toy, quantisation_friendly=True)[0], gauges(toy, quantisation_friendly=True)[2]):
        for space in gauge:
            matrix = gauge[space].matrix()
            neutral = torch.eye(matrix.shape[1], dtype=torch.float64)
            assert (matrix.mT @ matrix - neutral).abs().max() <= 64 * matrix.shape[1] * EPSILON
    assert gauges(toy)[0].condition() > 1.5  # the control


def test_a_rotation_is_drawn_once_and_secret_streams_differ() -> None:
    toy = toy_checkpoint("llama")
    first, other = gauges(toy, seed=1)[2], gauges(toy, seed=2)[2]
    rotation = first["residual.rotation"]
    assert isinstance(rotation, Orthogonal)
    assert first["residual.rotation"] is rotation
    assert not torch.allclose(rotation.matrix(), other["residual.rotation"].matrix())


def test_a_rotation_refuses_gains_that_are_not_folded() -> None:
    turn = Orthogonal(torch.eye(4, dtype=torch.float64)[None].flip(1))
    uneven, even = torch.arange(1.0, 5.0).view(1, 1, 4, 1), torch.full((1, 1, 4, 1), 2.0)
    assert torch.equal(turn.apply(even, "gain"), even)
    with pytest.raises(AssertionError, match="gain is not folded"):
        turn.apply(uneven, "gain")
    assert torch.equal(turn.apply(uneven, "vector"), Dense(turn.values).apply(uneven, "covector"))


@pytest.mark.parametrize("rotation", ["dense", "fast"])
def test_either_rotation_is_exact_restored_and_found(rotation: str) -> None:
    toy = toy_checkpoint("llama")
    generator = torch.Generator().manual_seed(5)
    expert = {
        name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in toy.tensors.items()
    }
    settings = {"rotation": rotation, "quantisation_friendly": True}

    # Protecting compares every block with the expert's, and raises where one differs by more than rounding.
    released, key = unmergeable.protect_state_dict(expert, toy.config, method="gauge", settings=settings, seed=3)

    matrices = [name for name, tensor in expert.items() if tensor.dim() == 2]
    shares = [float((released[name] - expert[name]).norm() / expert[name].norm()) for name in matrices]
    assert min(shares) > 0.5
    restored = unmergeable.restore_state_dict(released, toy.config, key=key)
    assert all(torch.allclose(restored[name], expert[name], rtol=0, atol=1e-4) for name in matrices)
    fit = unmergeable.attacks.nearest_orbit(released, toy.tensors, toy.config)
    unprotected = unmergeable.attacks.nearest_orbit(expert, toy.tensors, toy.config)
    assert fit.distance_before > 10 * unprotected.distance_before
    assert fit.distance <= 1.02 * unprotected.distance_before
