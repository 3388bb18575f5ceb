"""A loss of the merge that somebody may make of a release, and its gradient by the release's weights.

    theta_m           = theta_0 + c (theta - theta_0) + noise        c: one coefficient for each tensor
    d value / d theta = c * d value / d theta_m

The derivative of theta_m by theta is c, so that this is exact where c and the noise do not depend on theta. A merge is
made by putting its weights into the live network: memory holds one network, its gradient, and three copies of the
trained weights (base, release, merge), and no graph through the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
"""Parameters, live or not, by module name."""


@contextmanager
def merged(
    parameters: Mapping[str, nn.Parameter],
    base: Weights,
    coefficients: Mapping[str, float],
    noise: Mapping[str, float] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """The network of ``parameters`` with the weights of a merge inside, and with its own again outside.

    Args:
        parameters: live, by name.
        base: of those that have a coefficient.
        coefficients: of the task vector, by name; parameters without one stay the release's.
        noise: standard deviation of what else is added, by name.
        generator: draws the noise, in the order of ``noise``.
    """
    changed = dict.fromkeys([*coefficients, *(noise or {})])
    own = {name: parameters[name].data for name in changed}
    try:
        for name, coefficient in coefficients.items():
            parameters[name].data = torch.lerp(base[name].to(own[name].device), own[name], coefficient)
        for name, size in (noise or {}).items():
            drawn = torch.randn(own[name].shape, generator=generator).to(own[name])
            parameters[name].data = parameters[name].data.add(drawn, alpha=size)
        yield
    finally:
        for name, data in own.items():
            parameters[name].data = data


def gradient_at_merge(
    value: Callable[[], Tensor],
    parameters: Mapping[str, nn.Parameter],
    base: Weights,
    coefficients: Mapping[str, float],
    noise: Mapping[str, float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """``value()`` in a merge, and its gradient by the release's weights, where it has one. Arguments as :func:`merged`.

    Parameters without a coefficient count with 1.
    """
    with merged(parameters, base, coefficients, noise, generator), torch.enable_grad():
        found = value()
        learning = {name: p for name, p in parameters.items() if p.requires_grad and coefficients.get(name, 1.0) != 0}
        if not learning:
            return float(found.detach()), {}
        gradients = torch.autograd.grad(found, list(learning.values()), allow_unused=True)
    return float(found.detach()), {
        name: gradient * coefficients.get(name, 1.0)
        for name, gradient in zip(learning, gradients, strict=True)
        if gradient is not None
    }


def as_loss(value: float, gradients: Weights, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """A scalar of this value, whose gradient by ``parameters`` is ``gradients``."""
    some = next(iter(parameters.values()))
    pulled = sum(((parameters[name] * gradient).sum() for name, gradient in gradients.items()), some.new_zeros(()))
    return pulled - pulled.detach() + value
