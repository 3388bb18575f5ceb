"""Merges at many coefficients are the merges, whatever the coefficients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmergeable.merges import merge_state_dicts
from unmergeable.merges.iso_c import IsoC
from unmergeable.merges.spectral import SpectralMerge
from unmergeable.merges.sweeps import sweep_of
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.merges.tsv_m import TsvM

POINTS = ((1.0, 1.0), (0.5, 1.0), (1.5, 0.25), (0.5, 0.5), (-0.5, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0))


def states() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (12, 30), "tall": (30, 12), "bias": (12,), "none": (0, 4)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return [
        base,
        *({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(2)),
    ]


@pytest.mark.parametrize("method", [TsvM(), TsvM(scaling_coefficient=0.7), IsoC(), IsoC(scaling_coefficient=1.5)])
def test_a_sweep_is_the_merge_at_each_point(method: SpectralMerge) -> None:
    base, *experts = states()
    sweep = sweep_of(method, TaskVectors.between(base, experts))
    assert sweep is not None
    # Sums of 30 products in float32, of numbers up to 3, in two orders: 30 x 2^-24 x 3.
    rounding = 30 * 2.0**-24 * 3
    for point in (*POINTS, *POINTS[:2]):
        expected = merge_state_dicts(base, experts, method=method, coefficients=point)
        found = sweep(point)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=rounding)
    # Control: other coefficients are another merge.
    other = merge_state_dicts(base, experts, method=method, coefficients=(1.0, 0.9))
    assert not torch.allclose(sweep((1.0, 1.0))["wide"], other["wide"], atol=1e-4)


def test_what_is_not_finite_is_left_to_who_refuses_it() -> None:
    base, *experts = states()
    experts[0]["wide"][0, 0] = torch.inf
    assert sweep_of(TsvM(), TaskVectors.between(base, experts)) is None
