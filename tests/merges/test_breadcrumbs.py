"""``breadcrumbs``: a band of magnitudes, per tensor or per row, against a reference that sorts."""

import pytest
import torch
from torch import Tensor

from merges.small_models import DTYPES, State, flat, make_models, rounding_bound, size_bound
from unmergeable.errors import UsageError
from unmergeable.merges import Breadcrumbs, TaskArithmetic, merge_state_dicts
from unmergeable.merges.breadcrumbs import Trim, kept_band

COEFFICIENTS = [0.3, 1.0, -0.5]


def band_by_sorting(values: Tensor, density: float, gamma: float) -> Tensor:
    """Rows of ``values`` with all but the magnitudes of the band zeroed."""
    length = values.shape[-1]
    kept, outliers = int(density * length), min(int(gamma * length), length - int(density * length))
    if kept == 0:
        return torch.zeros_like(values)
    ordered = values.abs().sort(dim=-1, descending=True).values
    largest, smallest = ordered[:, outliers, None], ordered[:, outliers + kept - 1, None]
    return torch.where((values.abs() >= smallest) & (values.abs() <= largest), values, 0)


def reference(base: State, expert: State, *, density: float, gamma: float, trim: Trim) -> Tensor:
    compute = torch.float64 if base["scale"].dtype == torch.float64 else torch.float32
    parts = []
    for name, tensor in base.items():
        if tensor.is_floating_point() and tensor.numel():
            task_vector = expert[name].to(compute) - tensor.to(compute)
            by_row = trim == "row" and tensor.dim() > 1
            rows = task_vector.reshape(tensor.shape[0] if by_row else 1, -1)
            parts.append(band_by_sorting(rows, density, gamma).double().reshape(-1))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trim", ["tensor", "row"])
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.006), (0.5, 0.2), (0.9, 0.3), (1.0, 0.1)])
def test_equals_a_reference_that_sorts(dtype: torch.dtype, trim: Trim, density: float, gamma: float) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32 and density == 0.5)
    method = Breadcrumbs(density=density, gamma=gamma, trim=trim)
    merged = flat(merge_state_dicts(base, experts, method=method, coefficients=COEFFICIENTS))
    pairs = list(zip(COEFFICIENTS, experts, strict=True))
    expected = flat(base) + sum(c * reference(base, e, density=density, gamma=gamma, trim=trim) for c, e in pairs)
    bound = rounding_bound(size_bound(base, experts, COEFFICIENTS), dtype, operations=12)
    assert bool(((merged - expected).abs() <= bound).all())
    if density < 1:  # control: with the outliers it is another merge
        plain = flat(base) + sum(c * reference(base, e, density=density, gamma=0, trim=trim) for c, e in pairs)
        assert bool(((merged - plain).abs() > bound).any())


def test_drops_the_largest_and_the_smallest() -> None:
    base = {"weight": torch.zeros(10)}
    expert = {"weight": torch.tensor([5.0, -9.0, 1.0, 2.0, -3.0, 4.0, 6.0, -7.0, 8.0, 0.5])}
    merged = merge_state_dicts(base, [expert], method=Breadcrumbs(density=0.4, gamma=0.2), coefficients=[1.0])
    assert merged["weight"].tolist() == [5.0, 0, 0, 0, 0, 4.0, 6.0, -7.0, 0, 0]


@pytest.mark.parametrize("trim", ["tensor", "row"])
def test_of_equals_at_a_threshold_all_are_kept(trim: Trim) -> None:
    base = {"weight": torch.zeros(1, 100)}
    values = torch.cat([torch.full((5,), 3.0), torch.full((20,), -2.0), torch.full((75,), 1.0)])
    merged = merge_state_dicts(
        base, [{"weight": values[None]}], method=Breadcrumbs(density=0.1, gamma=0.03, trim=trim), coefficients=[1.0]
    )
    assert torch.equal(merged["weight"][0, :25], values[:25])  # ranks 4 to 13: the threes and the twos
    assert not merged["weight"][0, 25:].any()


def test_too_small_for_the_density_is_left_at_the_base() -> None:
    base, expert = {"weight": torch.ones(3)}, {"weight": torch.arange(3.0)}
    for trim in ("tensor", "row"):
        merged = merge_state_dicts(base, [expert], method=Breadcrumbs(trim=trim), coefficients=[1.0])
        assert torch.equal(merged["weight"], base["weight"])


@pytest.mark.parametrize("trim", ["tensor", "row"])
def test_everything_kept_is_task_arithmetic(trim: Trim) -> None:
    base, experts = make_models(2, torch.bfloat16)
    merged = merge_state_dicts(base, experts, method=Breadcrumbs(density=1, trim=trim))
    expected = merge_state_dicts(base, experts, method=TaskArithmetic(scaling_coefficient=0.2))
    assert torch.equal(flat(merged), flat(expected))


def test_kept_band() -> None:
    assert kept_band(0.15, 0.006, 1000) == (7, 156)
    assert kept_band(0.9, 0.3, 100) == (11, 100)
    assert kept_band(1.0, 0.01, 100) == (1, 100)
    assert kept_band(0.1, 0.01, 5) == (1, 0)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Breadcrumbs(density=0), "density"),
        (Breadcrumbs(gamma=1), "gamma"),
        (Breadcrumbs(gamma=-0.1), "gamma"),
        (Breadcrumbs(scaling_coefficient=float("nan")), "scaling_coefficient"),
        (Breadcrumbs(trim="global"), "trim=global: must be one of tensor, row"),  # type: ignore[arg-type]
    ],
)
def test_refuses_settings(method: Breadcrumbs, message: str) -> None:
    base, experts = make_models(1)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method)
