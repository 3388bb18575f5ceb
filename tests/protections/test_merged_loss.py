"""Losses at merges: the network has its own weights again, and the gradient is that of finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unmergeable.protections.merged_loss import as_loss, gradient_at_merge, merged

INPUTS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    built = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return built


def base_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() * 0.5 - 0.1 for name, parameter in parameters.items()}


def test_a_merge_is_what_the_formula_says_and_is_undone() -> None:
    net = network()
    parameters = dict(net.named_parameters())
    base, before = base_of(parameters), {name: p.detach().clone() for name, p in parameters.items()}

    with merged(
        parameters, base, {"0.weight": 0.3}, {"0.weight": 0.7, "2.bias": 0.5}, torch.Generator().manual_seed(4)
    ):
        drawn = torch.Generator().manual_seed(4)
        expected = base["0.weight"] + 0.3 * (before["0.weight"] - base["0.weight"])
        expected = expected + 0.7 * torch.randn(3, 3, generator=drawn).double()
        assert torch.allclose(parameters["0.weight"], expected, rtol=1e-12)
        assert torch.allclose(parameters["2.bias"], before["2.bias"] + 0.5 * torch.randn(2, generator=drawn).double())
        assert torch.equal(parameters["2.weight"], before["2.weight"])
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    with pytest.raises(RuntimeError), merged(parameters, base, {"0.weight": 0.3}):
        raise RuntimeError
    assert torch.equal(parameters["0.weight"], before["0.weight"])


@pytest.mark.parametrize("noise", [{}, {"0.weight": 0.4}])
def test_the_gradient_is_that_of_the_value_in_the_merge(noise: dict[str, float]) -> None:
    net = network()
    parameters = dict(net.named_parameters())
    base = base_of(parameters)
    coefficients = {"0.weight": 0.6, "0.bias": 0.0}

    def value() -> Tensor:
        return net(INPUTS).square().mean()

    def at_merge() -> float:
        with merged(parameters, base, coefficients, noise, torch.Generator().manual_seed(1)), torch.no_grad():
            return float(value())

    generator = torch.Generator().manual_seed(1)
    found, gradients = gradient_at_merge(value, parameters, base, coefficients, noise, generator)
    assert found == at_merge()
    assert set(gradients) == {"0.weight", "2.weight", "2.bias"}, "what the merge leaves out has none"
    loss = as_loss(found, gradients, parameters)
    assert float(loss.detach()) == found
    loss.backward()
    step = 1e-5
    for name in gradients:
        parameter, gradient = parameters[name], parameters[name].grad
        assert gradient is not None
        for place in ((0, 0), (1, 1)) if parameter.dim() == 2 else ((0,), (1,)):
            values = []
            for sign in (1, -2):
                with torch.no_grad():
                    parameter[place] += sign * step
                values.append(at_merge())
            with torch.no_grad():
                parameter[place] += step
            # Central differences: their error is of the order of step squared.
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-7)


def test_a_merge_without_the_release_has_no_gradient() -> None:
    net = network()
    parameters = dict(net.named_parameters())
    found, gradients = gradient_at_merge(
        lambda: net(INPUTS).square().mean(), parameters, base_of(parameters), dict.fromkeys(parameters, 0.0)
    )
    assert gradients == {}
    assert float(as_loss(found, gradients, parameters)) == found
