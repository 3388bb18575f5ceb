"""Heads and hidden units are recognised through any change of basis inside them, and only through those."""

from __future__ import annotations

import pytest
import torch

from attacks.planted import Build
from unmergeable.attacks.distance import block_distances
from unmergeable.attacks.hidden_units import permuted_similarity, unit_similarity
from unmergeable.attacks.matching import match
from unmergeable.attacks.moments import leg_pairs, legs_by_space
from unmergeable.attacks.permutations import head_similarity
from unmergeable.gauge.elements import Monomial
from unmergeable.gauge.gauge import fixed_gauge, sampled_gauge
from unmergeable.randomness import Stream

CONDITION = 20.0
EPSILON_32 = 2.0**-24


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "deepseek_v3", "falcon-40b-like"])
def test_head_similarity_is_the_cosine_of_the_products(name: str, network: Build) -> None:
    toy = network(name)
    space = next(iter(toy.architecture.symmetry.select("value_output").values()))
    legs = legs_by_space(toy.architecture.symmetry)[space.name]
    expert = toy.expert(0.3).tensors
    pairs = leg_pairs(space, legs, expert, toy.base.tensors, {})

    def products(side: str) -> torch.Tensor:
        """Both factors of every head multiplied out, one row per head."""
        writer, reader = (
            torch.cat([_columns(getattr(pair, side)) for pair in pairs if pair.variance == variance], dim=2)
            for variance in ("vector", "covector")
        )
        return (reader.mT @ writer).flatten(1)

    ours, theirs = products("protected"), products("base")
    expected = torch.nn.functional.cosine_similarity(theirs[:, None], ours[None], dim=2)
    assert torch.allclose(head_similarity(space, pairs), expected, atol=1e-12)


def _columns(view: torch.Tensor) -> torch.Tensor:
    """[blocks, size, everything else] of a leg's view."""
    return view.double().movedim((1, -2), (0, 1)).flatten(2)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_head_similarity_ignores_bases(name: str, network: Build) -> None:
    toy = network(name)
    space = next(iter(toy.architecture.symmetry.select("value_output").values()))
    legs = legs_by_space(toy.architecture.symmetry)[space.name]
    key = sampled_gauge({space.name: space}, Stream.from_seed(1), CONDITION)
    found, moved = (
        head_similarity(space, leg_pairs(space, legs, tensors, toy.base.tensors, {}))
        for tensors in (toy.base.tensors, toy.transformed(toy.base, key).tensors)
    )

    # Two factors in float32, each inverted within its condition number.
    assert (found - moved).abs().max() <= 2 * CONDITION**2 * EPSILON_32
    assert torch.equal(found.argmax(1), torch.arange(space.blocks))
    assert (found.diagonal() - 1).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "t5"])
def test_unit_similarity_ignores_scales(name: str, network: Build) -> None:
    toy = network(name)
    block = toy.architecture.feed_forwards[0]
    scale = toy.architecture.symmetry.spaces[f"{block.name}.scale"]
    key = sampled_gauge({scale.name: scale}, Stream.from_seed(1), CONDITION)
    scaled = toy.transformed(toy.base, key).tensors

    expected = unit_similarity(block, toy.base.tensors, toy.base.tensors)
    found = unit_similarity(block, scaled, toy.base.tensors)
    raw, raw_scaled = (permuted_similarity(block, side, toy.base.tensors) for side in (toy.base.tensors, scaled))

    # Cosines of some hundred numbers in float32: each within the square root of their count times its rounding.
    assert (found - expected).abs().max() <= 32 * EPSILON_32 * 4
    assert (raw - raw_scaled).abs().max() > 0.1  # the control


@pytest.mark.parametrize("name", ["gpt2", "bert", "gpt_neox"])
def test_similarity_of_plain_units_is_the_objective_of_the_nearest_order(name: str, network: Build) -> None:
    toy = network(name)
    block = toy.architecture.feed_forwards[0]
    order = toy.architecture.symmetry.spaces[f"{block.name}.order"]
    expert = toy.expert(0.3)
    similarity = unit_similarity(block, expert.tensors, toy.base.tensors)
    permutations = torch.from_numpy(Stream.from_seed(0).permutations(2, order.size))

    # ||P x - y||^2 = ||x||^2 + ||y||^2 - 2 sum of the similarities that P chooses: differences between orders agree.
    squares, sums = [], []
    for index in permutations:
        element = Monomial(index[None], torch.ones(1, order.size, dtype=torch.float64))
        moved = toy.transformed(expert, fixed_gauge({order.name: order}, {order.name: element}))
        squares.append((toy.distance(moved, "feed_forward")) ** 2)
        sums.append(float(similarity[torch.arange(order.size), index].double().sum()))
    feed_forwards = [
        part for part in block_distances(expert, toy.base, toy.architecture) if part.part == "feed_forward"
    ]
    norm = sum(part.base_norm**2 for part in feed_forwards)
    assert norm * (squares[0] - squares[1]) == pytest.approx(-2 * (sums[0] - sums[1]), rel=1e-3)


def test_margin_tells_a_clear_order_from_a_guess() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 200, generator=generator)

    assert match(torch.eye(200)).margin == 1
    assert match(torch.eye(200) + 0.02 * noise).margin > 0.9
    assert match(noise).margin < 0.1
    assert match(torch.zeros(3, 3)).margin == 0
