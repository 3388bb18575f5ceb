"""``soup``: the mean of the experts that are in it; best first, and nobody who makes it worse."""

from __future__ import annotations

import pytest
import torch

from merges.small_models import make_models
from unmergeable.errors import UsageError
from unmergeable.merges import Linear, Soup, merge_state_dicts, soup
from unmergeable.merges.soup import GreedySoup, Trial, find_greedy_soup


def test_is_the_mean_of_the_experts_that_are_in_it() -> None:
    base, experts = make_models(3)
    for chosen in ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0]):
        merged = merge_state_dicts(base, experts, method=Soup(), coefficients=list(chosen))
        those_in = [expert for expert, weight in zip(experts, chosen, strict=True) if weight]
        expected = merge_state_dicts(None, those_in, method=Linear())
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
    alone = merge_state_dicts(base, experts, method=Soup(), coefficients=[0.0, 1.0, 0.0])
    assert all(torch.equal(alone[name], experts[1][name]) for name in alone)


def test_refuses() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="at least 2 needed"):
        merge_state_dicts(base, experts[:1], method=Soup())
    with pytest.raises(UsageError, match="must be positive"):
        merge_state_dicts(base, experts, method=Soup(), coefficients=[0.0, 0.0])
    with pytest.raises(UsageError, match="examples=0"):
        merge_state_dicts(base, experts, method=Soup(examples=0))


def soup_of(positions: list[float], target: float) -> tuple[tuple[int, ...], tuple[float, ...], tuple[Trial, ...]]:
    """Experts of one weight; the nearer to the target the better."""
    experts = [lambda p=p: {"weight": torch.tensor([[p]])} for p in positions]
    found = find_greedy_soup(experts, lambda average: -abs(float(average["weight"]) - target))
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
    experts = [lambda p=p: {"weight": torch.tensor([[p]])} for p in (1.0, 2.0, 3.0)]
    find_greedy_soup(experts, lambda average: 0.0, progress=lambda *told: calls.append(told))
    assert [done for _, done, _, _ in calls] == [1, 2, 3, 4, 5]
    assert {total for _, _, total, _ in calls} == {5}


def test_a_score_chooses_the_experts_in_memory() -> None:
    experts = [{"weight": torch.tensor([[value]])} for value in (9.0, 5.0, 2.0)]
    merged = soup(None, experts, score=lambda average: -abs(float(average["weight"]) - 4.0))
    assert float(merged["weight"]) == 3.5
    assert float(soup(None, experts)["weight"]) == pytest.approx(16 / 3)  # control: the uniform soup
    with pytest.raises(UsageError, match="either a score or coefficients"):
        soup(None, experts, score=lambda average: 0.0, coefficients=[1, 1, 0])


def test_the_summary_has_the_experts_and_what_they_win() -> None:
    trials = (Trial((1,), 0.8, True), Trial((1, 0), 0.85, True), Trial((1, 0, 2), 0.5, False))
    assert GreedySoup((1, 0), (0.7, 0.8, 0.1), trials).summary == (
        "In the soup: experts 2, 1 (score 0.8500; the best alone 0.8000)"
    )
