"""``tsv_m`` keeps each expert's main directions and makes them orthogonal."""

import pytest
import torch
from torch import Tensor

from merges.small_models import flat, make_models
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import TaskArithmetic, TsvM, merge_state_dicts

EPS = torch.finfo(torch.float64).eps


def matrices(count: int, rows: int, columns: int, *, rank: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if rank is None:
        return [normal(rows, columns) for _ in range(count)]
    return [normal(rows, rank) @ normal(rank, columns) for _ in range(count)]


def reference(task_matrices: list[Tensor]) -> Tensor:
    """As the authors write it: all directions in one matrix per side, whitened by X (X^T X)^(-1/2)."""
    count = len(task_matrices)
    kept = min(task_matrices[0].shape) // count
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in task_matrices]
    left = torch.cat([u[:, :kept] for u, _, _ in parts], dim=1)
    right = torch.cat([vh[:kept] for _, _, vh in parts], dim=0)

    def whitened(columns: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(columns.T @ columns)
        return columns @ (vectors * values.rsqrt()) @ vectors.T

    return whitened(left) @ torch.diag(torch.cat([s[:kept] for _, s, _ in parts])) @ whitened(right.T).T


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (20, 21)])
@pytest.mark.parametrize("count", [2, 3])
def test_equals_a_reference(rows: int, columns: int, count: int) -> None:
    task_matrices = matrices(count, rows, columns)
    expected = reference(task_matrices)
    merged = TsvM().merge_matrices(task_matrices)
    # Whitening squares the condition number of the joined directions, which is below 1e3 here.
    assert float((merged - expected).norm()) < 1e6 * EPS * float(expected.norm())
    assert float((merged - sum(task_matrices)).norm()) > 0.1 * float(expected.norm())  # control


def test_orthogonal_experts_of_low_rank_are_added_up() -> None:
    first, second = torch.zeros(2, 12, 10, dtype=torch.float64).unbind()
    first[:4, :3] = matrices(1, 4, 3)[0]
    second[6:, 5:8] = matrices(1, 6, 3)[0]
    merged = TsvM().merge_matrices([first, second])
    assert float((merged - first - second).abs().max()) < 100 * EPS * float(first.norm() + second.norm())


def test_arbitrary_directions_of_low_rank_experts_do_no_harm() -> None:
    """A LoRA expert has a few directions; the decomposition completes them at will, and another one differently."""
    low = matrices(2, 60, 50, rank=3)
    merged = TsvM().merge_matrices(low)
    turned = TsvM().merge_matrices([matrix.flip(0) for matrix in low]).flip(0)
    assert float((merged - turned).norm()) < 1e4 * EPS * float(merged.norm())
    assert int(torch.linalg.matrix_rank(merged)) == 6


def test_singular_values_are_the_experts() -> None:
    task_matrices = matrices(2, 30, 20)
    values = torch.cat([torch.linalg.svdvals(matrix)[:10] for matrix in task_matrices]).sort(descending=True).values
    merged = torch.linalg.svdvals(TsvM().merge_matrices(task_matrices))
    torch.testing.assert_close(merged, values, rtol=1e4 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_matrices_are_merged_and_the_rest_averaged(dtype: torch.dtype) -> None:
    base, experts = make_models(2, dtype)
    merged = merge_state_dicts(base, experts, method=TsvM(scaling_coefficient=0.7), coefficients=[1.0, 0.5])
    tasks = [
        {name: c * (expert[name].double() - tensor.double()) for name, tensor in base.items()}
        for c, expert in zip((1.0, 0.5), experts, strict=True)
    ]
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name in ("embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "scale"):
        pair = [task[name] for task in tasks]
        expected = base[name].double() + 0.7 * (reference(pair) if pair[0].dim() == 2 else (pair[0] + pair[1]) / 2)
        scale = float(expected.norm()) * torch.finfo(dtype).eps + 1e6 * compute * float(sum(p.norm() for p in pair))
        assert float((merged[name].double() - expected).norm()) <= scale, name
    average = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.35, 0.175])
    assert not torch.equal(merged["embed.weight"], average["embed.weight"])


def test_a_zero_task_vector_gives_the_base_and_an_empty_tensor_is_no_trouble() -> None:
    base, _ = make_models(0)
    merged = merge_state_dicts(base, [base, base], method=TsvM())
    assert torch.equal(flat(merged), flat(base))
    assert merged["empty"].shape == (0, 4)


def test_refuses() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="scaling_coefficient"):
        merge_state_dicts(base, experts, method=TsvM(scaling_coefficient=float("nan")))
    experts[0]["embed.weight"][0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"embed.weight: expert 1 holds NaN"):
        merge_state_dicts(base, experts, method=TsvM())
