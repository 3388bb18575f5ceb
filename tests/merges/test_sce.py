"""``sce`` ranks weights by the variance that torch computes, without waiting for it."""

from __future__ import annotations

import pytest
import torch

from unmergeable.merges.sce import variance


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_variances_are_those_of_torch(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(10_000, generator=generator) * 1e-3 for _ in range(count)]
    before = [vector.clone() for vector in vectors]
    expected = torch.stack(vectors).var(dim=0, correction=0)
    # Both sum in float64 and round once, to the same float32 unless float64's rounding straddles the middle of two.
    assert int((variance(vectors) != expected).sum()) <= 1
    assert all(torch.equal(vector, copy) for vector, copy in zip(vectors, before, strict=True))
    narrow = torch.stack(vectors).sub(torch.stack(vectors).mean(dim=0)).square().mean(dim=0)
    assert count == 1 or int((narrow != expected).sum()) > 100  # control: in float32 they are others


def test_variances_of_float64_leave_their_operands_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(3)]
    before = [vector.clone() for vector in vectors]
    expected = torch.stack(vectors).var(dim=0, correction=0)
    torch.testing.assert_close(variance(vectors), expected, rtol=1e-13, atol=1e-16)
    assert all(torch.equal(vector, copy) for vector, copy in zip(vectors, before, strict=True))
