"""``linear`` is the weighted average of the experts, and of nothing else."""

import pytest
import torch

from merges.small_models import DTYPES, flat, make_models, rounding_bound, size_bound
from unmergeable.errors import UsageError
from unmergeable.merges import Linear, merge_state_dicts

COEFFICIENTS = [0.5, 0.3, 0.7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_formula(dtype: torch.dtype, normalize: bool) -> None:
    _, experts = make_models(3, dtype, several_blocks=dtype == torch.float32)
    merged = merge_state_dicts(None, experts, method=Linear(normalize=normalize), coefficients=COEFFICIENTS)

    divisor = sum(COEFFICIENTS) if normalize else 1.0
    weights = [coefficient / divisor for coefficient in COEFFICIENTS]
    expected = sum(weight * flat(expert) for weight, expert in zip(weights, experts, strict=True))
    # 3 products, 2 sums, 1 quotient, and the coefficients themselves rounded
    bound = rounding_bound(size_bound(None, experts, weights), dtype, operations=8)
    assert bool(((flat(merged) - expected).abs() <= bound).all())
    # Control: other weights are far outside of the bound.
    other = sum(weight * flat(expert) for weight, expert in zip(reversed(weights), experts, strict=True))
    assert bool(((flat(merged) - other).abs() > bound).any())


def test_the_base_takes_no_part() -> None:
    base, experts = make_models(2)
    with_base = merge_state_dicts(base, experts, method=Linear())
    without = merge_state_dicts(None, experts, method=Linear())
    assert torch.equal(flat(with_base), flat(without))
    # Control: as an expert it does.
    assert not torch.equal(flat(merge_state_dicts(None, [base, *experts], method=Linear())), flat(without))


def test_a_base_that_takes_no_part_must_still_fit() -> None:
    base, experts = make_models(2)
    del base["scale"]
    with pytest.raises(Exception, match="scale"):
        merge_state_dicts(base, experts, method=Linear())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_the_average_of_equals_is_each_of_them(dtype: torch.dtype, count: int) -> None:
    base, _ = make_models(0, dtype, several_blocks=dtype == torch.float32)
    merged = merge_state_dicts(None, [base] * count, method=Linear())
    # A sum of n equal float32 numbers errs by at most (n - 1) half steps, so narrower dtypes get the same number
    # back; float32 and float64 may miss the last bit.
    slack = 0 if dtype.itemsize == 2 else count * torch.finfo(dtype).eps
    assert bool(((flat(merged) - flat(base)).abs() <= slack * flat(base).abs()).all())


def test_refuses_weights_that_do_not_average() -> None:
    _, experts = make_models(2)
    with pytest.raises(UsageError, match="positive sum"):
        merge_state_dicts(None, experts, method=Linear(), coefficients=[0.5, -0.5])
    merge_state_dicts(None, experts, method=Linear(normalize=False), coefficients=[0.5, -0.5])


def test_a_single_expert_is_itself_and_none_is_refused() -> None:
    _, experts = make_models(1)
    merged = merge_state_dicts(None, experts, method=Linear())
    assert all(torch.equal(merged[name], tensor) for name, tensor in experts[0].items())
    with pytest.raises(UsageError, match="0 experts given, at least 1 needed"):
        merge_state_dicts(None, [], method=Linear())
