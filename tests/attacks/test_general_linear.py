"""The nearest invertible matrix: a minimum, whatever the data lack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmergeable.attacks.general_linear import nearest_general_linear
from unmergeable.attacks.moments import Moments

BLOCKS = 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(protected: Tensor, base: Tensor) -> Moments:
    return Moments(protected @ protected.mT, base @ protected.mT, base @ base.mT)


def planted(size: int, columns: tuple[int, int], share: float, condition: float = 20.0) -> tuple[Tensor, list[Tensor]]:
    """A secret matrix, and W', W0, U', U0 that it relates up to noise of ``share``."""
    left, right = (torch.linalg.qr(normal(BLOCKS, size, size, seed=seed)).Q for seed in (1, 2))
    spectrum = torch.logspace(0, 1, size, base=condition, dtype=torch.float64) / condition**0.5
    secret = left @ torch.diag(spectrum) @ right
    w, u = (normal(BLOCKS, size, count, seed=3 + side) for side, count in enumerate(columns))
    w_moved = secret @ (w + share * normal(*w.shape, seed=5))
    u_moved = torch.linalg.inv(secret).mT @ (u + share * normal(*u.shape, seed=6))
    return secret, [w_moved, w, u_moved, u]


def objective(matrix: Tensor, data: list[Tensor]) -> Tensor:
    w_moved, w, u_moved, u = data
    inverse = torch.linalg.inv(matrix)
    return (matrix @ w_moved - w).square().sum((1, 2)) + (inverse.mT @ u_moved - u).square().sum((1, 2))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_finds_the_planted_matrix(share: float) -> None:
    secret, data = planted(8, (64, 64), share)
    found = nearest_general_linear(moments(*data[:2]), moments(*data[2:]))

    assert bool((objective(found, data) <= objective(torch.linalg.inv(secret), data) + 1e-9).all())
    if share == 0:
        assert torch.allclose(found @ secret, torch.eye(8).double().expand(BLOCKS, -1, -1), atol=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.3, 2.0])
def test_no_small_step_leads_lower(share: float) -> None:
    _, data = planted(6, (20, 30), share)
    found = nearest_general_linear(moments(*data[:2]), moments(*data[2:]))
    reached = objective(found, data)

    for seed in range(20):
        step = 1e-3 * normal(BLOCKS, 6, 6, seed=100 + seed)
        assert bool((objective(torch.matrix_exp(step) @ found, data) > reached).all())
    # The control: away from the minimum some of these steps do lead lower.
    away = torch.matrix_exp(0.1 * normal(BLOCKS, 6, 6, seed=7)) @ found
    steps = [torch.matrix_exp(1e-3 * normal(BLOCKS, 6, 6, seed=100 + seed)) @ away for seed in range(20)]
    assert any(bool((objective(step, data) < objective(away, data)).any()) for step in steps)


@pytest.mark.parametrize("columns", [(3, 64), (3, 3), (2, 5), (1, 0)])
def test_fewer_columns_than_rows(columns: tuple[int, int]) -> None:
    secret, data = planted(8, columns, 0.1)
    found = nearest_general_linear(moments(*data[:2]), moments(*data[2:]))

    assert bool(found.isfinite().all())
    assert bool((torch.linalg.matrix_rank(found) == 8).all())
    assert bool((objective(found, data) <= objective(torch.linalg.inv(secret), data)).all())


def test_heads_without_data_stay() -> None:
    _, data = planted(4, (16, 16), 0.0)
    for side in data:
        side[1] = 0
    found = nearest_general_linear(moments(*data[:2]), moments(*data[2:]))

    assert torch.equal(found[1], torch.eye(4).double())
    assert bool((objective(found, data) < 1e-9).all())


def test_one_silent_side_leaves_least_squares() -> None:
    _, data = planted(4, (16, 16), 0.1)
    data[2], data[3] = torch.zeros_like(data[2]), torch.zeros_like(data[3])
    found = nearest_general_linear(moments(*data[:2]), moments(*data[2:]))

    expected = torch.linalg.lstsq(data[0].mT, data[1].mT).solution.mT
    assert torch.allclose(found, expected, atol=1e-8)


def test_never_worse_than_doing_nothing() -> None:
    unrelated = [normal(BLOCKS, 6, 40, seed=seed) for seed in range(4)]
    found = nearest_general_linear(moments(*unrelated[:2]), moments(*unrelated[2:]))
    identity = torch.eye(6).double().expand(BLOCKS, -1, -1)

    assert bool((objective(found, unrelated) <= objective(identity, unrelated)).all())
