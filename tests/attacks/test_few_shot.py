"""What the attacker does with n examples, before any network is there."""

from __future__ import annotations

import pytest

from unmergeable.attacks import FewShot
from unmergeable.attacks.few_shot import FOLDS, JUDGED, parse_rates, turns
from unmergeable.errors import UsageError


@pytest.mark.parametrize(
    ("samples", "expected"), [(2, (2, 2)), (3, (3, 3)), (16, (4, 4)), (100, (4, 2)), (1000, (4, 1))]
)
def test_as_many_folds_take_a_turn_as_the_judgement_needs(samples: int, expected: tuple[int, int]) -> None:
    folds, used = turns(samples)
    assert (folds, used) == expected
    judged = used * samples / folds
    assert judged >= min(JUDGED, samples)
    assert used == 1 or (used - 1) * samples / FOLDS < JUDGED  # one less would not do


def test_rates_are_read_from_text() -> None:
    assert parse_rates("1e-3") == (1e-3,)
    assert parse_rates("3e-5, 1e-4") == (3e-5, 1e-4)
    assert len(parse_rates(FewShot().learning_rates)) > 1


@pytest.mark.parametrize("text", ["", "1e-3;1e-4", "0", "-1", "1,nan", "inf", "1,,2"])
def test_rates_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give positive numbers separated by commas"):
        parse_rates(text)
