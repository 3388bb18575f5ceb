"""Sums in pieces are those of whole tensors in float64."""

from __future__ import annotations

import pytest
import torch

from unmergeable import sums


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PIECE", 50)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares(axis: int, transposed: bool, dtype: torch.dtype) -> None:
    values = torch.randn(7, 31, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = values.T if transposed else values
    factors = torch.rand(values.shape[1 - axis % 2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = values.double()
    expected = whole.movedim(axis, 0).square()

    # Sums of 217 squares in another order.
    assert sums.squares(values) == pytest.approx(float(whole.square().sum()), rel=1e-14)
    assert torch.allclose(sums.squares_along(values, axis), expected.sum(1), rtol=1e-14, atol=0)
    scaled = (expected * factors.square()).sum(1)
    assert torch.allclose(sums.squares_along(values, axis, factors), scaled, rtol=1e-14, atol=0)


def test_squares_along_the_last_of_three_axes() -> None:
    values = torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sums.squares_along(values, -1), values.double().square().sum((0, 1)), rtol=1e-14, atol=0)
    assert torch.allclose(sums.squares_along(values[0, 0], 0), values[0, 0].double().square())


def test_large_numbers_do_not_overflow() -> None:
    values = torch.full((30, 30), 1e30)
    assert sums.squares(values) == pytest.approx(900 * 1e60, rel=1e-6)


@pytest.mark.parametrize("flat", [False, True])
def test_pieces_cover_a_tensor_once_and_are_small(flat: bool) -> None:
    values = torch.arange(7 * 31).reshape(7, 31)
    found = [piece for (piece,) in sums.pieces(values, flat=flat)]
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in found]), values.reshape(-1).double())
    assert len(found) > 1
    assert all(piece.dtype == torch.float64 and piece.numel() <= 50 for piece in found)
