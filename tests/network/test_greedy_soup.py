"""The greedy soup: best first, and nobody who makes it worse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unmergeable.errors import Mismatch
from unmergeable.network.greedy_soup import Trial, find_greedy_soup


def soup_of(positions: list[float], target: float) -> tuple[tuple[int, ...], tuple[float, ...], tuple[Trial, ...]]:
    """Experts of one weight; the nearer to the target the better."""
    network = nn.Linear(1, 1, bias=False)
    before = network.weight.detach().clone()
    experts = [lambda p=p: {"weight": torch.tensor([[p]])} for p in positions]
    found = find_greedy_soup(network, experts, lambda network: -abs(float(network.weight.detach()) - target))
    assert torch.equal(network.weight, before)
    return found.experts, found.coefficients, found.trials


def test_joins_who_does_not_make_it_worse() -> None:
    """Worked by hand: 5 alone is off by 1; with 2, 3.5 is off by 0.5; with 9 the mean 16/3 is off by more."""
    experts, coefficients, trials = soup_of([9.0, 5.0, 2.0], target=4.0)
    assert experts == (1, 2)
    assert coefficients == (0.0, 1.0, 1.0)
    assert trials == (
        Trial((1,), -1.0, is_kept=True),
        Trial((1, 2), -0.5, is_kept=True),
        Trial((1, 2, 0), pytest.approx(-4 / 3), is_kept=False),
    )


def test_an_equal_score_joins_and_the_order_of_equals_is_theirs() -> None:
    experts, coefficients, _ = soup_of([3.0, 3.0, 3.0], target=4.0)
    assert experts == (0, 1, 2)
    assert coefficients == (1.0, 1.0, 1.0)


def test_the_best_stays_alone_if_all_make_it_worse() -> None:
    experts, coefficients, _ = soup_of([10.0, 4.0, 20.0], target=4.0)
    assert experts == (1,)
    assert coefficients == (0.0, 1.0, 0.0)


def test_progress_counts_every_average() -> None:
    calls = []
    network = nn.Linear(1, 1, bias=False)
    experts = [lambda p=p: {"weight": torch.tensor([[p]])} for p in (1.0, 2.0, 3.0)]
    find_greedy_soup(network, experts, lambda network: 0.0, progress=lambda *told: calls.append(told))
    assert [done for _, done, _, _ in calls] == [1, 2, 3, 4, 5]
    assert {total for _, _, total, _ in calls} == {5}


def test_refuses_weights_of_another_network() -> None:
    with pytest.raises(Mismatch, match="no such tensor"):
        find_greedy_soup(nn.Linear(1, 1), [lambda: {"gone": torch.zeros(1)}], lambda network: 0.0)
