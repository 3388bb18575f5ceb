"""``slerp`` moves along the arc between two tensors at constant angular speed."""

from math import cos, pi, sin

import pytest
import torch

from merges.small_models import DTYPES, flat, make_models, rounding_bound
from unmergeable.errors import UsageError
from unmergeable.merges import Linear, Slerp, merge_state_dicts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_equals_the_formula(dtype: torch.dtype, t: float) -> None:
    _, experts = make_models(2, dtype, task_size=1.0, several_blocks=dtype == torch.float32)
    merged = merge_state_dicts(None, experts, method=Slerp(t=t))
    for name, tensor in merged.items():
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        first, second = (expert[name].double().reshape(-1) for expert in experts)
        cosine = float(first @ second / (first.norm() * second.norm()))
        assert abs(cosine) < 0.9995
        angle = torch.tensor(cosine, dtype=torch.float64).acos()
        weights = [float(torch.sin((1 - t) * angle) / torch.sin(angle)), float(torch.sin(t * angle) / torch.sin(angle))]
        size = abs(weights[0]) * first.abs() + abs(weights[1]) * second.abs()
        # 2 rounded weights, 2 products, 1 sum; the cosine's 1e-7 moves the weights by about as much
        bound = rounding_bound(size, dtype, operations=12)
        expected = weights[0] * first + weights[1] * second
        assert bool(((tensor.double().reshape(-1) - expected).abs() <= bound).all()), name
        if 0 < t < 1:  # control: a straight line is shorter
            line = (1 - t) * first + t * second
            assert bool(((tensor.double().reshape(-1) - line).abs() > bound).any())


def test_a_quarter_circle_at_constant_speed() -> None:
    first, second = {"weight": torch.tensor([2.0, 0.0])}, {"weight": torch.tensor([0.0, 2.0])}
    for step in range(5):
        merged = merge_state_dicts(None, [first, second], method=Slerp(t=step / 4))["weight"]
        angle = step / 4 * pi / 2
        expected = torch.tensor([2 * cos(angle), 2 * sin(angle)])
        torch.testing.assert_close(merged, expected, rtol=0, atol=8 * torch.finfo(torch.float32).eps)


def test_ends_are_the_models() -> None:
    _, experts = make_models(2, torch.bfloat16)
    for t, expert in zip((0.0, 1.0), experts, strict=True):
        assert torch.equal(flat(merge_state_dicts(None, experts, method=Slerp(t=t))), flat(expert))


def test_coefficients_place_it() -> None:
    _, experts = make_models(2)
    by_coefficients = merge_state_dicts(None, experts, method=Slerp(t=0.9), coefficients=[3.0, 1.0])
    assert torch.equal(flat(by_coefficients), flat(merge_state_dicts(None, experts, method=Slerp(t=0.25))))


@pytest.mark.parametrize("factor", [1.0, 1.5, -1.0])
def test_parallel_and_opposed_tensors_are_interpolated_linearly(factor: float) -> None:
    _, (expert,) = make_models(1)
    other = {name: factor * tensor if tensor.is_floating_point() else tensor for name, tensor in expert.items()}
    merged = merge_state_dicts(None, [expert, other], method=Slerp(), coefficients=[0.75, 0.25])
    assert torch.equal(
        flat(merged), flat(merge_state_dicts(None, [expert, other], method=Linear(), coefficients=[0.75, 0.25]))
    )


def test_a_zero_tensor_has_no_direction_and_does_no_harm() -> None:
    zero, one = {"weight": torch.zeros(4)}, {"weight": torch.ones(4)}
    merged = merge_state_dicts(None, [zero, one], method=Slerp())["weight"]
    torch.testing.assert_close(merged, torch.full((4,), sin(pi / 4)), rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_refuses() -> None:
    _, experts = make_models(3)
    with pytest.raises(UsageError, match="3 experts given, at most 2"):
        merge_state_dicts(None, experts, method=Slerp())
    with pytest.raises(UsageError, match="both experts a coefficient, or neither"):
        merge_state_dicts(None, experts[:2], method=Slerp(), coefficients=[0.5, None])
    for coefficients in ([-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(UsageError, match="must not be negative"):
            merge_state_dicts(None, experts[:2], method=Slerp(), coefficients=coefficients)
    for method in (Slerp(t=1.5), Slerp(t=float("nan")), Slerp(linear_above=2)):
        with pytest.raises(UsageError, match="must lie in"):
            merge_state_dicts(None, experts[:2], method=method)
