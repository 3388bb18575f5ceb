"""The assignment is the best of all, and read off where it can be."""

from __future__ import annotations

import itertools

import pytest
import torch

from unmergeable.gauge.assignment import best_assignment


@pytest.mark.parametrize("seed", range(20))
def test_is_the_best_of_all_orders(seed: int) -> None:
    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
    found = best_assignment(similarity)

    totals = [similarity[range(6), order].sum() for order in itertools.permutations(range(6))]
    assert sorted(found.tolist()) == list(range(6))
    assert similarity[range(6), found].sum() == pytest.approx(float(max(totals)), abs=6 * 2.0**-23 * 6)


def test_is_read_off_where_the_best_columns_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    monkeypatch.setattr(scipy.optimize, "linear_sum_assignment", None)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))

    assert torch.equal(best_assignment(torch.eye(50)[order]), order.argsort().argsort())
    with pytest.raises(TypeError):  # the control: here it is needed
        best_assignment(torch.ones(3, 3))
