"""``adamerging`` as a merge of tensors: task arithmetic, or task vectors of elected signs that are summed."""

from __future__ import annotations

import pytest
import torch

from merges.small_models import DTYPES, flat, make_models, rounding_bound, size_bound
from unmergeable.errors import UsageError
from unmergeable.merges import AdaMerging, TaskArithmetic, Ties, merge_state_dicts
from unmergeable.merges.adamerging import keep_elected


def test_plain_task_vectors_are_task_arithmetic() -> None:
    base, experts = make_models(2)
    merged = merge_state_dicts(base, experts, method=AdaMerging(), coefficients=[0.2, None])
    expected = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.2, 0.3])
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elected_task_vectors_are_summed(dtype: torch.dtype) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32)
    coefficients, density = [0.3, 0.5, 1.0], 0.3
    merged = merge_state_dicts(
        base, experts, method=AdaMerging(task_vectors="ties", density=density), coefficients=coefficients
    )
    tasks = torch.stack([flat(expert) - flat(base) for expert in experts])
    kept = int(density * tasks.shape[1])
    thresholds = tasks.abs().sort(dim=1, descending=True).values[:, kept - 1 : kept]
    trimmed = tasks * (tasks.abs() >= thresholds)
    elected = trimmed * (trimmed.sign() == trimmed.sum(0).sign())
    expected = flat(base) + (torch.tensor(coefficients, dtype=torch.float64)[:, None] * elected).sum(0)
    bound = rounding_bound(size_bound(base, experts, coefficients), dtype, operations=8)
    assert bool(((flat(merged) - expected).abs() <= bound).all())
    # Controls: without the election, and with TIES' mean, it would be another merge.
    summed = flat(base) + (torch.tensor(coefficients, dtype=torch.float64)[:, None] * trimmed).sum(0)
    assert bool(((summed - expected).abs() > bound).any())
    mean = flat(merge_state_dicts(base, experts, method=Ties(density=density), coefficients=coefficients))
    assert bool(((mean - expected).abs() > bound).any())


def test_election_by_hand() -> None:
    vectors = [torch.tensor([3.0, -1.0, 0.5, 2.0, -2.0]), torch.tensor([-1.0, -2.0, 4.0, -2.0, 0.1])]
    keep_elected(vectors, torch.empty(5), (1.0, 1.0))
    assert vectors[0].tolist() == [3.0, -1.0, 0.0, 0.0, -2.0]  # 2 against -2 elects nobody
    assert vectors[1].tolist() == [0.0, -2.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (AdaMerging(granularity="tensor"), "granularity=tensor: must be one of layer, task"),  # type: ignore[arg-type]
        (AdaMerging(task_vectors="dare"), "task_vectors=dare: must be one of plain, ties"),  # type: ignore[arg-type]
        (AdaMerging(density=0), r"density=0: must lie in \(0, 1\]"),
        (AdaMerging(start=float("inf")), "start=inf: must be a finite number"),
        (AdaMerging(learning_rate=0), "learning_rate=0: must be positive"),
        (AdaMerging(learning_rate=float("nan")), "learning_rate=nan: must be positive"),
        (AdaMerging(steps=0), "steps=0, batch_size=16: at least one of each"),
        (AdaMerging(batch_size=0), "batch_size=0: at least one of each"),
        (AdaMerging(examples=0), "examples=0: at least one"),
    ],
)
def test_refuses_settings(method: AdaMerging, message: str) -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method)
