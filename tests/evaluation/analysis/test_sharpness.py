"""On quadratics the highest loss in a ball is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from evaluation.analysis.quadratic import Quadratic, backpropagate, inner, minus, quadratic, state
from unmergeable.evaluation.analysis import sharpness

RADII = (0.01, 0.3)


def norms(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(tensor.norm()) for name, tensor in weights.items()}


def test_the_first_step_reaches_the_worst_of_an_even_curvature() -> None:
    """With one curvature h per tensor: L = sum of h/2 (d + r ||W||)^2, d the distance to the minimum."""
    curvature = {
        name: torch.full_like(tensor, h) for (name, tensor), h in zip(state(0).items(), (2.0, 5.0), strict=True)
    }
    network, weights = Quadratic(curvature, state(0)), state(1)
    found = sharpness(network, weights, backpropagate, radii=RADII, steps=1)
    away = norms(minus(weights, network.minimum))
    heights = {"first": 2.0, "second": 5.0}
    assert found.loss == pytest.approx(sum(heights[name] / 2 * away[name] ** 2 for name in away), rel=1e-12)
    for radius, worst in zip(RADII, found.worst, strict=True):
        reach = {name: away[name] + radius * norm for name, norm in norms(weights).items()}
        assert worst == pytest.approx(sum(heights[name] / 2 * reach[name] ** 2 for name in reach), rel=1e-12)


def test_steps_climb_to_the_largest_curvature() -> None:
    """At a minimum the worst is sum of r^2 ||W||^2 h_max / 2.

    Power iteration from a start of equal magnitudes: after k steps the share of the other directions is at most
    (n - 1) (h_2 / h_max)^(2k), and the loss falls short by no more than that share.
    """
    network = quadratic()
    for name in network.curvature:
        network.curvature[name].flatten()[1] = 9.0  # the others lie between 1 and 3
    radius, steps = 0.2, 8
    found = sharpness(network, network.minimum, backpropagate, radii=(radius,), steps=steps)
    expected = sum(radius**2 * norm**2 * 9.0 / 2 for norm in norms(network.minimum).values())
    shortfall = 11 * (3 / 9) ** (2 * (steps - 1))
    assert found.loss == 0
    assert expected * (1 - shortfall) <= found.rises[0] <= expected * (1 + 1e-12)
    first = sharpness(network, network.minimum, backpropagate, radii=(radius,), steps=1)
    assert first.rises[0] < 0.7 * expected  # control: the start itself is not the worst


def test_no_draw_in_the_ball_is_worse() -> None:
    network, weights = quadratic(), state(1)
    (rise,) = sharpness(network, weights, backpropagate, radii=(0.1,), steps=10).rises
    lengths = norms(weights)
    away = minus(weights, network.minimum)
    for seed in range(200):
        drawn = state(seed + 1000)
        step = {name: 0.1 * lengths[name] * tensor / tensor.norm() for name, tensor in drawn.items()}
        moved = {name: away[name] + step[name] for name in away}
        assert 0.5 * (inner(moved, moved, network.curvature) - inner(away, away, network.curvature)) < rise


def test_does_not_change_with_the_scale_of_a_tensor() -> None:
    """weight -> c weight with a loss that undoes it: the same function, the same relative ball."""
    network, weights, factor = quadratic(), state(1), 8.0
    plain = sharpness(network, weights, backpropagate, radii=RADII)
    scaled = Quadratic(
        {**network.curvature, "first": network.curvature["first"] / factor**2},
        {**network.minimum, "first": network.minimum["first"] * factor},
    )
    moved = {**weights, "first": weights["first"] * factor}
    assert sharpness(scaled, moved, backpropagate, radii=RADII).worst == pytest.approx(plain.worst, rel=1e-9)


def test_a_larger_ball_holds_what_a_smaller_one_does() -> None:
    """On a wave, a long ascent steps over the crest that a short one reaches: sin(4 (w - 1)) from w = 1."""

    def wave(network: nn.Module) -> float:
        network.zero_grad(set_to_none=True)
        loss = torch.sin(4 * (network.weight - 1)).sum()
        loss.backward()
        return float(loss.detach())

    network = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    centre = {"weight": torch.ones(1, 1, dtype=torch.float64)}
    short, long = math.sin(4 * 0.4), math.sin(4 * -1)
    assert sharpness(network, centre, wave, radii=(1.0,), steps=3).worst[0] == pytest.approx(long)
    assert sharpness(network, centre, wave, radii=(0.4, 1.0), steps=3).worst == pytest.approx((short, short))


def test_the_network_is_as_before() -> None:
    network = quadratic()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sharpness(network, state(1), backpropagate, radii=(0.1,), steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert math.isfinite(backpropagate(network))
