"""Curves of a quadratic are parabolas, whose barriers are known."""

from __future__ import annotations

import pytest

from evaluation.analysis.quadratic import inner, minus, quadratic, score, state
from unmergeable.errors import UsageError
from unmergeable.evaluation.analysis import Curve, barrier, connectivity, scaling
from unmergeable.merges.task_vectors import TaskVectors


def test_the_line_between_two_models_of_a_quadratic() -> None:
    """Along a line a quadratic is L(t) = straight line - t (1 - t) c / 2 with c its curvature along the line.

    The models are base + tau, so the line is theta_0 + t tau_1 + (1 - t) tau_2.
    """
    network, base, first, second = quadratic(), state(1), state(2), state(3)
    curve = connectivity(network, TaskVectors.between(base, [first, second]), score)
    along = minus(first, second)
    curvature = inner(along, along, network.curvature)
    ends = {}
    for position, weights in ((0.0, second), (1.0, first)):
        away = minus(weights, network.minimum)
        ends[position] = 0.5 * inner(away, away, network.curvature)
    for position, loss in zip(curve.positions, curve.losses, strict=True):
        straight = (1 - position) * ends[0.0] + position * ends[1.0]
        assert loss == pytest.approx(straight - position * (1 - position) * curvature / 2, rel=1e-12)
    assert barrier(curve) == 0, "a convex loss has none"
    turned = Curve(curve.positions, tuple(-loss for loss in curve.losses), curve.credits)
    assert barrier(turned) == pytest.approx(curvature / 8, rel=1e-12), "t = 1/2 is where it is highest"
    assert curve.credits == turned.losses


def test_scaling_is_a_parabola_from_the_base_on() -> None:
    network, base, experts = quadratic(), state(1), [state(2), state(3)]
    for count in (1, 2):
        curve = scaling(network, TaskVectors.between(base, experts[:count]), score, coefficients=(0.0, 0.5, 1.0, 2.0))
        direction = {name: sum(expert[name] - base[name] for expert in experts[:count]) for name in base}
        from_minimum = minus(base, network.minimum)
        for position, loss in zip(curve.positions, curve.losses, strict=True):
            at = {name: from_minimum[name] + position * direction[name] for name in base}
            assert loss == pytest.approx(0.5 * inner(at, at, network.curvature), rel=1e-12)


def test_the_network_is_as_before() -> None:
    network = quadratic()
    before = score(network)
    connectivity(network, TaskVectors.between(state(1), [state(2), state(3)]), score)
    assert score(network) == before


def test_what_is_no_line_is_refused() -> None:
    three = TaskVectors.between(state(1), [state(2), state(3), state(4)])
    with pytest.raises(UsageError, match="2 coefficients for 3 experts"):
        connectivity(quadratic(), three, score)
    for positions in ((0.0, 0.5), (0.5, 1.0), (0.0, 2.0), ()):
        with pytest.raises(UsageError, match="from 0 to 1"):
            barrier(Curve(positions, (0.0,) * len(positions), (0.0,) * len(positions)))
