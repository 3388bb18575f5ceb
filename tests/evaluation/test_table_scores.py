"""Averages: their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unmergeable.evaluation.table_scores import Mean


def test_the_error_of_one_row_is_that_of_a_mean() -> None:
    row = np.array([0.0, 1.0, 1.0, 0.5])
    mean = Mean.over([("digits", row)])
    assert mean.value == pytest.approx(0.625)
    assert mean.error == pytest.approx(row.std(ddof=1) / 2)


def test_rows_of_different_tasks_are_independent() -> None:
    first, second = np.array([0.0, 1.0] * 8), np.array([0.0, 1.0, 1.0, 1.0] * 25)
    mean = Mean.over([("digits", first), ("animals", second)])
    assert mean.value == pytest.approx((first.mean() + second.mean()) / 2)
    errors = [row.std(ddof=1) / math.sqrt(len(row)) for row in (first, second)]
    assert mean.error == pytest.approx(math.hypot(*errors) / 2)


def test_rows_of_one_task_share_their_examples() -> None:
    """The same row twice says no more than once; two rows that disagree everywhere have no error at all."""
    row = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    once = Mean.over([("digits", row)])
    twice = Mean.over([("digits", row), ("digits", row)])
    assert (twice.value, twice.error) == pytest.approx((once.value, once.error))
    assert Mean.over([("digits", row), ("digits", 1 - row)]).error == pytest.approx(0)


def test_one_example_has_no_error() -> None:
    assert Mean.over([("digits", np.array([1.0]))]).record().to_json() == {"mean": 1.0, "standard_error": None}
