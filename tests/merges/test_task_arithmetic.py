"""``task_arithmetic`` adds scaled task vectors to the base."""

import pytest
import torch

from merges.small_models import DTYPES, flat, make_models, rounding_bound, size_bound
from unmergeable.errors import UsageError
from unmergeable.merges import TaskArithmetic, merge_state_dicts

COEFFICIENTS = [0.3, 1.0, -0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(dtype: torch.dtype) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32)
    merged = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=COEFFICIENTS)

    pairs = list(zip(COEFFICIENTS, experts, strict=True))
    expected = flat(base) + sum(c * (flat(expert) - flat(base)) for c, expert in pairs)
    # 3 differences, 3 products, 3 sums, and the coefficients themselves rounded; a difference errs by half an
    # epsilon of itself, which its share of the size covers
    bound = rounding_bound(size_bound(base, experts, COEFFICIENTS), dtype, operations=12)
    assert bool(((flat(merged) - expected).abs() <= bound).all())
    # Control: coefficients that are a hundredth off are told apart in float32.
    if dtype.itemsize >= 4:
        other = flat(base) + sum((c + 0.01) * (flat(expert) - flat(base)) for c, expert in pairs)
        assert bool(((flat(merged) - other).abs() > bound).any())


def test_default_is_published() -> None:
    base, experts = make_models(2)
    default = merge_state_dicts(base, experts, method=TaskArithmetic())
    assert torch.equal(
        flat(default), flat(merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.3, 0.3]))
    )
    own = merge_state_dicts(base, experts, method=TaskArithmetic(scaling_coefficient=0.5), coefficients=[None, 0.8])
    assert torch.equal(
        flat(own), flat(merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.5, 0.8]))
    )
    assert not torch.equal(flat(own), flat(default))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keeps_small_task_vectors(dtype: torch.dtype) -> None:
    """With coefficient 1 the expert comes back bit by bit: its task vector is not rounded to the stored dtype."""
    base, experts = make_models(1, dtype, task_size=1e-3)
    merged = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[1.0])
    assert torch.equal(flat(merged), flat(experts[0]))
    # Control: arithmetic in the stored dtype gives something else.
    rounded = {n: base[n] + 0.3 * (experts[0][n] - base[n]) for n in base if base[n].is_floating_point()}
    exact = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.3])
    assert not torch.equal(flat(rounded), flat(exact))


def test_coefficient_zero_is_the_base() -> None:
    base, experts = make_models(2)
    assert torch.equal(
        flat(merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.0, 0.0])), flat(base)
    )


def test_one_expert_is_enough() -> None:
    base, experts = make_models(1)
    merge_state_dicts(base, experts, method=TaskArithmetic())
    with pytest.raises(UsageError, match="at least 1"):
        merge_state_dicts(base, [], method=TaskArithmetic())


def test_refuses_what_is_not_a_number() -> None:
    base, experts = make_models(1)
    with pytest.raises(UsageError, match="finite"):
        merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[float("nan")])
    with pytest.raises(UsageError, match="scaling_coefficient"):
        merge_state_dicts(base, experts, method=TaskArithmetic(scaling_coefficient=float("inf")))


def test_needs_the_base() -> None:
    _, experts = make_models(2)
    with pytest.raises(UsageError, match="name the base"):
        merge_state_dicts(None, experts, method=TaskArithmetic())
