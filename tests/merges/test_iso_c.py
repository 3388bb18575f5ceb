"""``iso_c`` flattens the spectrum of the summed task matrices."""

import pytest
import torch

from merges.small_models import flat, make_models
from unmergeable.errors import UsageError
from unmergeable.merges import IsoC, merge_state_dicts
from unmergeable.merges.iso_c import flattened


def test_flattens_the_spectrum_and_keeps_the_directions() -> None:
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    flat_matrix = flattened(matrix)
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(torch.linalg.svdvals(flat_matrix), values.mean().expand(20), rtol=1000 * eps, atol=0)
    in_directions = left.T @ flat_matrix @ right.T
    assert float((in_directions - torch.diag(values.mean().expand(20))).abs().max()) < 1000 * eps * float(values[0])
    assert float(values[0] - values[-1]) > 1  # control: it was not flat before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equals_the_formula(dtype: torch.dtype) -> None:
    base, experts = make_models(3, dtype, task_size=0.1)
    coefficients = [1.0, 0.5, 2.0]
    merged = merge_state_dicts(base, experts, method=IsoC(scaling_coefficient=1.5), coefficients=coefficients)
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name in ("embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "scale"):
        total = sum(
            c * (expert[name].double() - base[name].double()) for c, expert in zip(coefficients, experts, strict=True)
        )
        assert isinstance(total, torch.Tensor)
        if total.dim() == 2:
            left, values, right = torch.linalg.svd(total, full_matrices=False)
            condition = float(values[0] / values[-1])
            step = values.mean() * (left @ right)
        else:
            condition, step = 1.0, total / 3
        expected = base[name].double() + 1.5 * step
        # The directions turn by an epsilon times the condition number.
        scale = torch.finfo(dtype).eps * float(expected.norm()) + 100 * compute * condition * float(step.norm())
        assert float((merged[name].double() - expected).norm()) <= scale, name
        if total.dim() == 2:  # control
            assert float((merged[name].double() - base[name].double() - 1.5 * total).norm()) > 2 * scale


def test_a_zero_task_vector_gives_the_base() -> None:
    base, _ = make_models(0)
    assert torch.equal(flat(merge_state_dicts(base, [base, base], method=IsoC())), flat(base))


def test_refuses_settings() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="scaling_coefficient"):
        merge_state_dicts(base, experts, method=IsoC(scaling_coefficient=float("inf")))
