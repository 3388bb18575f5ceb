"""Activation functions as polynomials around a point of their own for every hidden unit (arXiv 2410.05331, 2511.10712).

A unit that was seen with inputs around u, in steps of r, has with t = (z - u) / r

    act(z) = sum_n a_n P_n(t)        taylor:  P_n(t) = t^n               a_n = r^n act^(n)(u) / n!
                                     hermite: P_n(t) = He_n(t)/sqrt(n!)  a_n = E[act(u + r t) P_n(t)], t ~ N(0, 1)

The Taylor polynomial is exact at u and worthless beyond the nearest singularity: that of SiLU lies at distance
sqrt(u^2 + pi^2), GELU has none. The Hermite polynomial is the best in the mean over a normal distribution of inputs.
Derivatives come from exact recurrences of power series in float64, never from differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmergeable.errors import UsageError

Basis = Literal["taylor", "hermite"]

_QUADRATURE_REACH = 12.0  # the normal density is 2e-32 there
_QUADRATURE_POINTS = 1025
_CHUNK_ELEMENTS = 1 << 20
_GRID = 65  # points at which errors are looked for


@dataclass(frozen=True)
class Activation:
    """``value``: the function, float64 to float64. ``series(u, order)``: float64 [k] to act^(n)(u)/n!, [order + 1, k].

    ``hermite(u, r, order)``: the a_n of the module docstring where they have a closed form. Exactly one of ``series``
    and ``hermite`` is given: a function with a kink has no Taylor series.
    """

    value: Callable[[Tensor], Tensor]
    series: Callable[[Tensor, int], Tensor] | None = None
    hermite: Callable[[Tensor, Tensor, int], Tensor] | None = None


def gated_by_sigmoid(linear: float, cubic: float = 0.0) -> Activation:
    """z * sigmoid(linear z + cubic z^3): SiLU, quick GELU, and GELU in its tanh form."""

    def value(z: Tensor) -> Tensor:
        return z * torch.sigmoid(linear * z + cubic * z**3)

    def series(u: Tensor, order: int) -> Tensor:
        # Of y = linear z + cubic z^3 around u, the coefficients of y'.
        slopes = (linear + 3 * cubic * u**2, 6 * cubic * u, torch.full_like(u, 3 * cubic))
        inside = linear * u + cubic * u**3
        # s' = s (1 - s) y'. Both factors have a series of their own: 1 - s would lose its digits where s is near 1.
        sigmoid = torch.zeros(order + 1, *u.shape, dtype=torch.float64)
        complement, product = torch.zeros_like(sigmoid), torch.zeros_like(sigmoid)
        sigmoid[0], complement[0] = torch.sigmoid(inside), torch.sigmoid(-inside)
        for n in range(order):
            product[n] = (sigmoid[: n + 1] * complement[: n + 1].flip(0)).sum(0)
            terms = [slope * product[n - m] for m, slope in enumerate(slopes) if m <= n]
            sigmoid[n + 1] = sum(terms[1:], start=terms[0]) / (n + 1)
            complement[n + 1] = -sigmoid[n + 1]
        return _times_argument(sigmoid, u)

    return Activation(value, series)


def _gelu() -> Activation:
    """z * Phi(z), Phi the normal distribution function."""

    def value(z: Tensor) -> Tensor:
        return z * _distribution(z)

    def series(u: Tensor, order: int) -> Tensor:
        # The density g obeys g' = -z g, and Phi' = g.
        density = torch.zeros(order + 1, *u.shape, dtype=torch.float64)
        density[0] = _density(u)
        for n in range(order):
            density[n + 1] = -(u * density[n] + (density[n - 1] if n else 0.0)) / (n + 1)
        distribution = torch.zeros_like(density)
        distribution[0] = _distribution(u)
        for n in range(order):
            distribution[n + 1] = density[n] / (n + 1)
        return _times_argument(distribution, u)

    return Activation(value, series)


def _relu() -> Activation:
    def hermite(u: Tensor, r: Tensor, order: int) -> Tensor:
        """Integrals of (t - a) P_n(t) over t > a = -u/r: He_n times the density is minus the derivative of the last."""
        a = -u / r
        polynomials = hermite_polynomials(a, order)
        found = torch.zeros(order + 1, *u.shape, dtype=torch.float64)
        found[0] = u * _distribution(-a) + r * _density(a)
        if order >= 1:
            found[1] = r * _distribution(-a)
        for n in range(2, order + 1):
            found[n] = r * _density(a) * polynomials[n - 2] / math.sqrt(n * (n - 1))
        return found

    return Activation(torch.relu, hermite=hermite)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _distribution(z: Tensor) -> Tensor:
    """Phi(z), with all its digits where it is small (``torch.special.ndtr`` gives 0 below -8.3)."""
    return torch.erfc(-z / math.sqrt(2)) / 2


def _times_argument(series: Tensor, u: Tensor) -> Tensor:
    """The series of z f(z) around u, from that of f: z = u + (z - u)."""
    product = u * series
    product[1:] += series[:-1]
    return product


SILU, QUICK_GELU, GELU, RELU = gated_by_sigmoid(1.0), gated_by_sigmoid(1.702), _gelu(), _relu()
# tanh(y) = 2 sigmoid(2 y) - 1
GELU_TANH = gated_by_sigmoid(2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": SILU,
    "swish": SILU,
    "quick_gelu": QUICK_GELU,
    "gelu": GELU,
    "gelu_python": GELU,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": RELU,
}
"""By the name in a configuration."""


def require_activation(name: str, basis: Basis) -> Activation:
    """The activation called ``name``.

    Raises:
        UsageError: it is unknown, or has no polynomial in this basis.
    """
    activation = ACTIVATIONS.get(name)
    if activation is None:
        raise UsageError(f"activation {name!r} has no polynomial here; known: {', '.join(ACTIVATIONS)}.")
    if basis == "taylor" and activation.series is None:
        raise UsageError(
            f"{name} has no Taylor series: it is linear on either side of its kink, and what is beyond first order is "
            "zero; use basis=hermite."
        )
    return activation


def coefficients(activation: Activation, basis: Basis, u: Tensor, r: Tensor, order: int) -> Tensor:
    """The a_n of the module docstring: float64 [k] and [k] to [order + 1, k]."""
    if basis == "taylor":
        assert activation.series is not None, "ask require_activation first"
        steps = torch.arange(order + 1, dtype=torch.float64)[:, None]
        return activation.series(u, order) * r**steps
    if activation.hermite is not None:
        return activation.hermite(u, r, order)
    return _projection(activation, u, r, order)


def _projection(activation: Activation, u: Tensor, r: Tensor, order: int) -> Tensor:
    """Hermite coefficients by the trapezoidal rule.

    Its error under a normal density falls as exp(-2 pi d / h), d the distance from the real axis of the nearest
    singularity of act(u + r t) in t, h the step: for SiLU, where d = pi/r, below 1e-15 up to r = 24.
    """
    t = torch.linspace(-_QUADRATURE_REACH, _QUADRATURE_REACH, _QUADRATURE_POINTS, dtype=torch.float64)
    weights = hermite_polynomials(t, order) * _density(t) * (t[1] - t[0])
    step = max(1, _CHUNK_ELEMENTS // _QUADRATURE_POINTS)
    parts = [
        weights @ activation.value(centre + t[:, None] * scale)
        for centre, scale in zip(u.split(step), r.split(step), strict=True)
    ]
    return torch.cat(parts, dim=1)


def hermite_polynomials(t: Tensor, order: int) -> Tensor:
    """He_n(t)/sqrt(n!), n up to ``order``, stacked in front."""
    found = [torch.ones_like(t), t]
    for n in range(1, order):
        found.append((t * found[n] - math.sqrt(n) * found[n - 1]) / math.sqrt(n + 1))
    return torch.stack(found[: order + 1])


def evaluate(basis: Basis, a: Tensor, t: Tensor) -> Tensor:
    """sum_n a_n P_n(t): ``a`` [order + 1, k] and ``t`` [..., k]."""
    if basis == "hermite":
        polynomials = hermite_polynomials(t, len(a) - 1)
        return torch.einsum("nk,n...k->...k", a, polynomials)
    value = a[-1].expand_as(t)
    for coefficient in a[:-1].flip(0):  # Horner's rule
        value = torch.addcmul(coefficient, value, t)
    return value


def remainder_bound(activation: Activation, u: Tensor, radius: Tensor, order: int) -> Tensor:
    """Lagrange's bound on the error of the Taylor polynomial within ``radius`` of ``u``, float64 [k].

    radius^(N+1) times the largest act^(N+1)/(N+1)! there, looked for on a grid, and allowed to grow between two of
    its points by the next derivative's largest value.
    """
    assert activation.series is not None
    points = torch.linspace(-1, 1, _GRID, dtype=torch.float64)
    peak, growth = torch.zeros_like(u), torch.zeros_like(u)
    for point in points:
        series = activation.series(u + point * radius, order + 2)
        peak = torch.maximum(peak, series[order + 1].abs())
        growth = torch.maximum(growth, (order + 2) * series[order + 2].abs())
    return radius ** (order + 1) * (peak + growth * radius / (_GRID - 1))


def largest_error(activation: Activation, basis: Basis, a: Tensor, u: Tensor, r: Tensor, reach: Tensor) -> Tensor:
    """The largest |act(z) - polynomial(z)| found for |z - u| <= ``reach``, float64 [k]."""
    worst = torch.zeros_like(u)
    for point in torch.linspace(-1, 1, _GRID, dtype=torch.float64):
        z = u + point * reach
        worst = torch.maximum(worst, (activation.value(z) - evaluate(basis, a, (z - u) / r)).abs())
    return worst
