"""``model_stock`` interpolates by the angle between task vectors."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from merges.small_models import DTYPES, State, flat, make_models, rounding_bound
from unmergeable.errors import UsageError
from unmergeable.merges import ModelStock, merge_state_dicts


def reference(base: Tensor, experts: list[Tensor]) -> Tensor:
    """By the formula, for tensors whose last axis is compared."""
    tasks = [expert - base for expert in experts]
    cosines = [(one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1)) for one, other in combinations(tasks, 2)]
    cosine = torch.stack(cosines).mean(dim=0)[..., None]
    count = len(experts)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return ratio * sum(experts) / count + (1 - ratio) * base


def agreeing(count: int, dtype: torch.dtype) -> tuple[State, list[State]]:
    """Experts whose task vectors share a part: their angles are far from right ones."""
    base, (shared, *experts) = make_models(count + 1, torch.float64)
    mixed = [
        {n: (t + shared[n] - base[n] if t.is_floating_point() else t) for n, t in expert.items()} for expert in experts
    ]
    return tuple(  # type: ignore[return-value]
        [{n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()} for state in states]
        if isinstance(states, list)
        else {n: t.to(dtype) if t.is_floating_point() else t for n, t in states.items()}
        for states in (base, mixed)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_equals_the_formula(dtype: torch.dtype, count: int, filter_wise: bool) -> None:
    base, experts = agreeing(count, dtype)
    merged = merge_state_dicts(base, experts, method=ModelStock(filter_wise=filter_wise))
    for name in ("embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight"):
        shape = (-1, base[name].shape[-1]) if filter_wise else (1, -1)
        weights = base[name].double().reshape(shape)
        others = [expert[name].double().reshape(shape) for expert in experts]
        expected = reference(weights, others)
        difference = (merged[name].double().reshape(shape) - expected).abs()
        # Rows of two elements may be nearly opposed: the ratio is then large and as uncertain.
        if filter_wise and shape[1] < 16:
            continue
        size = weights.abs() + sum((other - weights).abs() for other in others)
        # The inner products err by an epsilon per element summed in float64; each product is rounded to float32.
        bound = rounding_bound(size, dtype, operations=4 * count + 20)
        assert bool((difference <= bound).all()), name
        assert bool(((sum(others) / count - expected).abs() > bound).any())  # control: it is no average


def test_equal_experts_are_returned_and_orthogonal_ones_give_the_base() -> None:
    base = {"weight": torch.zeros(4)}
    one, other = {"weight": torch.tensor([1.0, 0, 0, 0])}, {"weight": torch.tensor([0, 1.0, 0, 0])}
    assert torch.equal(merge_state_dicts(base, [one, one, one], method=ModelStock())["weight"], one["weight"])
    assert torch.equal(merge_state_dicts(base, [one, other], method=ModelStock())["weight"], base["weight"])


@pytest.mark.parametrize("filter_wise", [False, True])
def test_opposed_and_unchanged_tensors_stay_at_the_base(filter_wise: bool) -> None:
    base = {"weight": torch.full((2, 3), 0.5), "frozen": torch.ones(3), "scale": torch.tensor(2.0)}
    task_vector = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    experts = [{**base, "weight": base["weight"] + sign * task_vector} for sign in (1, -1)]
    merged = merge_state_dicts(base, experts, method=ModelStock(filter_wise=filter_wise))
    assert all(torch.equal(merged[name], base[name]) for name in base)


def test_a_floor_under_the_norms_keeps_small_task_vectors_out() -> None:
    base = {"weight": torch.zeros(4)}
    expert = {"weight": torch.full((4,), 1e-5)}  # norms of 2e-5, a product of 4e-10
    exact = merge_state_dicts(base, [expert, expert], method=ModelStock())
    floored = merge_state_dicts(base, [expert, expert], method=ModelStock(smallest_norms=1e-6))
    assert torch.equal(exact["weight"], expert["weight"])
    assert float(floored["weight"].max()) < 1e-8


def test_refuses() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="without coefficients"):
        merge_state_dicts(base, experts, method=ModelStock(), coefficients=[0.5, None])
    with pytest.raises(UsageError, match="at least 2"):
        merge_state_dicts(base, experts[:1], method=ModelStock())
    with pytest.raises(UsageError, match="smallest_norms"):
        merge_state_dicts(base, experts, method=ModelStock(smallest_norms=float("nan")))
    assert flat(merge_state_dicts(base, experts, method=ModelStock())).isfinite().all()  # control
