from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch.nn import functional

from unmergeable.errors import UsageError
from unmergeable.polynomials.activations import (
    ACTIVATIONS,
    coefficients,
    evaluate,
    hermite_polynomials,
    largest_error,
    remainder_bound,
    require_activation,
)

SMOOTH = ("silu", "quick_gelu", "gelu", "gelu_new")
ORDER = 12
EPSILON = 2.0**-53
CENTRES = torch.tensor([-9.0, -3.1, -0.75, 0.0, 0.4, 2.0, 7.5], dtype=torch.float64)

_ROOT = mpmath.sqrt(2 / mpmath.pi)
EXACT: dict[str, Callable[[Any], Any]] = {
    "silu": lambda z: z / (1 + mpmath.exp(-z)),
    "quick_gelu": lambda z: z / (1 + mpmath.exp(-mpmath.mpf(1.702) * z)),
    "gelu": lambda z: z * mpmath.ncdf(z),
    "gelu_new": lambda z: z * (1 + mpmath.tanh(_ROOT * (z + mpmath.mpf(0.044715) * z**3))) / 2,
}
TORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu": functional.gelu,
    "gelu_new": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
}


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_are_those_of_the_function(name: str) -> None:
    """Against 40 digits; roundings of the recurrences add up to ORDER^2 of them, relative to the largest coefficient
    around: near a zero of one the terms that make it cancel."""
    series = ACTIVATIONS[name].series
    assert series is not None
    found = series(CENTRES, ORDER)
    with mpmath.workdps(40):
        for index, u in enumerate(CENTRES.tolist()):
            exact = [float(c) for c in mpmath.taylor(EXACT[name], u, ORDER)]
            size = max(abs(c) for c in exact[1:]) + abs(exact[0])
            for n, value in enumerate(exact):
                error = abs(float(found[n, index]) - value)
                assert error <= ORDER**2 * EPSILON * size * 4, (name, u, n)


@pytest.mark.parametrize("name", [*SMOOTH, "relu"])
def test_functions_are_those_of_torch(name: str) -> None:
    z = torch.linspace(-12, 12, 97, dtype=torch.float64)

    assert torch.allclose(ACTIVATIONS[name].value(z), TORCH[name](z), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", SMOOTH)
def test_taylor_error_stays_below_lagrange_and_shrinks_with_the_order(name: str) -> None:
    activation = ACTIVATIONS[name]
    radius = torch.ones_like(CENTRES)
    errors = []
    for order in (2, 4, 8, 12):
        a = coefficients(activation, "taylor", CENTRES, radius, order)
        error = largest_error(activation, "taylor", a, CENTRES, radius, radius)
        bound = remainder_bound(activation, CENTRES, radius, order)
        assert bool((error <= bound + 1e-14).all())
        errors.append(float(error.max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_silu_series_diverges_beyond_its_singularity() -> None:
    """Why units with wide ranges are left alone: at distance 2 pi from 0 more terms make it worse."""
    u, r = torch.zeros(1, dtype=torch.float64), torch.tensor([2 * math.pi], dtype=torch.float64)
    silu = ACTIVATIONS["silu"]
    few, many = (
        float(largest_error(silu, "taylor", coefficients(silu, "taylor", u, r, order), u, r, r)) for order in (4, 16)
    )

    assert many > 10 * few


@pytest.mark.parametrize("name", [*SMOOTH, "relu"])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_hermite_coefficients_are_projections(name: str, scale: float) -> None:
    """Against integration in 20 digits."""
    u = torch.tensor([-1.3, 0.6], dtype=torch.float64)
    r = torch.full_like(u, scale)
    found = coefficients(ACTIVATIONS[name], "hermite", u, r, 5)
    function = EXACT.get(name, lambda z: max(z, mpmath.mpf(0)))
    with mpmath.workdps(20):
        for index, centre in enumerate(u.tolist()):
            kink = -centre / scale
            for n in range(6):

                def integrand(t: Any, n: int = n, centre: float = centre) -> Any:
                    polynomial = mpmath.hermite(n, t / mpmath.sqrt(2)) / mpmath.mpf(2) ** (mpmath.mpf(n) / 2)
                    return function(centre + scale * t) * polynomial * mpmath.npdf(t) / mpmath.sqrt(mpmath.factorial(n))

                exact = float(mpmath.quad(integrand, sorted([-10, -4, -1, kink, 1, 4, 10])))
                assert abs(float(found[n, index]) - exact) <= 1e-12


def test_hermite_polynomials_are_orthonormal() -> None:
    t = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    density = torch.exp(-t * t / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    polynomials = hermite_polynomials(t, 6)

    assert torch.allclose((polynomials * density) @ polynomials.T, torch.eye(7, dtype=torch.float64), atol=1e-12)


def test_hermite_is_nearer_on_average_and_taylor_at_the_centre() -> None:
    silu = ACTIVATIONS["silu"]
    u, r = torch.tensor([0.5], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    t = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 1)))
    at_centre = torch.zeros(1, 1, dtype=torch.float64)

    def error(basis: Any, where: torch.Tensor) -> float:
        a = coefficients(silu, basis, u, r, 8)
        return float((evaluate(basis, a, where) - silu.value(u + r * where)).square().mean())

    assert error("hermite", t) < error("taylor", t) / 100
    assert error("taylor", at_centre) < 1e-25 < error("hermite", at_centre)


def test_refuses_what_has_no_polynomial() -> None:
    with pytest.raises(UsageError, match="'mish' has no polynomial here; known: silu"):
        require_activation("mish", "taylor")
    with pytest.raises(UsageError, match=r"relu has no Taylor series.*use basis=hermite"):
        require_activation("relu", "taylor")
    assert require_activation("relu", "hermite").hermite is not None
