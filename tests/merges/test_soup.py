"""``soup`` as a merge of tensors: the mean of the experts that are in it."""

from __future__ import annotations

import pytest
import torch

from merges.small_models import make_models
from unmergeable.errors import UsageError
from unmergeable.merges import Linear, Soup, merge_state_dicts


def test_is_the_mean_of_the_experts_that_are_in_it() -> None:
    base, experts = make_models(3)
    for chosen in ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0]):
        merged = merge_state_dicts(base, experts, list(chosen), Soup())
        those_in = [expert for expert, weight in zip(experts, chosen, strict=True) if weight]
        expected = merge_state_dicts(None, those_in, None, Linear())
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
    alone = merge_state_dicts(base, experts, [0.0, 1.0, 0.0], Soup())
    assert all(torch.equal(alone[name], experts[1][name]) for name in alone)


def test_refuses() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="at least 2 needed"):
        merge_state_dicts(base, experts[:1], None, Soup())
    with pytest.raises(UsageError, match="must be positive"):
        merge_state_dicts(base, experts, [0.0, 0.0], Soup())
    with pytest.raises(UsageError, match="examples=0"):
        merge_state_dicts(base, experts, None, Soup(examples=0))
