"""Noise is relative to each tensor, and costs what the curvature says."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from evaluation.analysis.quadratic import quadratic, score
from unmergeable.evaluation.analysis import Scored, noise_sensitivity

DRAWS = 400


def test_costs_what_the_curvature_says_on_average() -> None:
    """At the minimum E L = size^2 / 2 * sum of ||W||^2 / numel * tr H_W, and its spread over draws is known:

    the variance of sum of h_i s_i^2 z_i^2 / 2 is sum of (h_i s_i^2)^2 / 2.
    """
    network = quadratic()
    size = 0.3
    found = noise_sensitivity(network, network.minimum, score, sizes=(0.0, size), draws=DRAWS, seed=1)
    terms = [
        curvature * float(tensor.square().mean()) * size**2
        for name, tensor in network.minimum.items()
        for curvature in network.curvature[name].flatten().tolist()
    ]
    deviation = math.sqrt(sum(term**2 for term in terms) / 2 / DRAWS)
    mean = statistics.fmean(row[1] for row in found.losses)
    assert abs(mean - sum(terms) / 2) < 4 * deviation
    assert abs(mean - sum(terms) / 2 * 1.1) > 4 * deviation  # control: one tenth more would be seen
    assert all(row[0] == 0 for row in found.losses), "no noise, no cost"


def test_a_draw_is_one_direction_made_longer() -> None:
    """So a quadratic at its minimum costs exactly the square of the size."""
    network = quadratic()
    found = noise_sensitivity(network, network.minimum, score, sizes=(0.1, 0.2, 0.4), draws=2)
    for row in found.losses:
        assert row[1] == pytest.approx(4 * row[0], rel=1e-9)
        assert row[2] == pytest.approx(16 * row[0], rel=1e-9)
    assert found.losses[0][0] != found.losses[1][0]
    assert found.credits[0][0] == -found.losses[0][0]


def test_is_relative_to_each_tensor_and_known_by_its_seed() -> None:
    network = quadratic()
    larger = {name: 10 * tensor for name, tensor in network.minimum.items()}
    network.minimum = larger
    sizes, seed = (0.1,), 5
    ten_times = noise_sensitivity(network, larger, score, sizes=sizes, draws=1, seed=seed)
    network = quadratic()
    once, again, other = (
        noise_sensitivity(network, network.minimum, score, sizes=sizes, draws=1, seed=number)
        for number in (seed, seed, seed + 1)
    )
    assert ten_times.losses[0][0] == pytest.approx(100 * once.losses[0][0], rel=1e-9)
    assert once == again != other


def test_whole_numbers_are_left_alone() -> None:
    network = torch.nn.Linear(2, 1, bias=False)
    network.register_buffer("places", torch.arange(3))
    seen = []

    def look(at: Any) -> Scored:
        seen.append((at.places.tolist(), at.weight.detach().clone()))
        return Scored(0.0, 0.0)

    noise_sensitivity(network, dict(network.state_dict()), look, sizes=(0.0, 1.0), draws=1)
    assert [places for places, _ in seen] == [[0, 1, 2]] * 2
    assert not torch.equal(seen[0][1], seen[1][1])
