"""``della``: larger weights survive likelier, by rank within a row, and the expectation is kept."""

from math import sqrt

import pytest
import torch
from torch import Tensor

from merges.small_models import DTYPES, flat, make_models, rounding_bound, size_bound
from merges.test_dare_linear import operand
from unmergeable.errors import UsageError
from unmergeable.merges import Della, Ties, merge_state_dicts
from unmergeable.merges.della import ascending, keep_probabilities, magprune_mask
from unmergeable.merges.masks import mask_stream

STREAM = mask_stream(0, 1, "weight")


def mask(task_vector: Tensor, *, density: float = 0.5, epsilon: float = 0.3, divide: bool = False) -> Tensor:
    base = operand(torch.zeros_like(task_vector))
    magprune = magprune_mask(STREAM, base, operand(task_vector), density=density, epsilon=epsilon, divide=divide)
    return torch.cat([block.clone() for block in magprune.read(1000)]).reshape(task_vector.shape)


def test_probabilities_rise_evenly_with_the_rank_in_the_row() -> None:
    task_vector = torch.tensor([[3.0, -1.0, 0.5, -4.0, 2.0], [0.0, 0.1, 0.2, 0.3, 0.4]])
    probabilities = keep_probabilities(task_vector, density=0.5, epsilon=0.2)
    expected = torch.tensor([[0.6, 0.4, 0.3, 0.7, 0.5], [0.3, 0.4, 0.5, 0.6, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=4 * torch.finfo(torch.float64).eps)
    assert float(keep_probabilities(torch.ones(1, 1), density=0.5, epsilon=0.2)) == 0.5


def test_keeps_as_often_as_the_rank_says() -> None:
    rows = 2000
    generator = torch.Generator().manual_seed(2)
    magnitudes = torch.arange(1.0, 301.0)
    order = torch.stack([torch.randperm(300, generator=generator) for _ in range(rows)])
    kept = mask(magnitudes[order])
    by_rank = torch.zeros(300).scatter_add_(0, order.reshape(-1), kept.reshape(-1)) / rows
    expected = torch.linspace(0.2, 0.8, 300)
    worst = 5 * sqrt(0.25 / rows)
    assert float((by_rank - expected).abs().max()) < worst
    assert float((by_rank - 0.5).abs().max()) > worst  # control: DARE would keep all alike


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 2, 3), (2, 200_000), (0, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    task_vector = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert mask(task_vector).shape == shape if shape != (0, 4) else True
    base = {"weight": torch.zeros(shape)}
    merged = merge_state_dicts(base, [{"weight": task_vector}] * 2, method=Della())
    assert merged["weight"].shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_a_reference(dtype: torch.dtype) -> None:
    base, experts = make_models(2, dtype, several_blocks=dtype == torch.float32)
    merged = merge_state_dicts(base, experts, method=Della())
    thinned = {
        name: torch.stack(
            [
                torch.cat(
                    [
                        *magprune_mask(
                            mask_stream(0, number, name),
                            operand(base[name]),
                            operand(expert[name]),
                            density=0.7,
                            epsilon=0.07,
                            divide=True,
                        ).read(2**20),
                        torch.zeros(0),
                    ]
                ).double()
                * (expert[name].double() - base[name].double()).reshape(-1)
                for number, expert in enumerate(experts, start=1)
            ]
        )
        for name in base
        if base[name].is_floating_point()
    }
    stacked = torch.cat(list(thinned.values()), dim=1)
    mass = stacked.sum(dim=0)
    agree = (stacked.sign() == mass.sign()) & (stacked != 0)
    mean = torch.where(agree, stacked, 0).sum(dim=0) / agree.sum(dim=0).clamp_min(1)
    # q >= 0.63, and 1/q rounded in the mask
    bound = rounding_bound(size_bound(base, experts, [1.1 / 0.63] * 2), dtype, operations=16)
    decided = (mass.abs() > 8 * torch.finfo(torch.float32).eps * stacked.abs().sum(dim=0)) | (stacked == 0).all(dim=0)
    difference = (flat(merged) - flat(base) - 1.1 * mean).abs()
    assert bool((difference <= bound)[decided].all())
    assert float(decided.double().mean()) > 0.98  # two experts of few bfloat16 values often cancel exactly
    assert bool(((flat(merged) - flat(base) - mean).abs() > bound)[decided].any())  # control: scaling 1


def test_keeps_the_expectation_although_probabilities_differ() -> None:
    task_vector = torch.linspace(-1, 1, 501).expand(4000, 501).contiguous()
    mean = (mask(task_vector, divide=True) * task_vector).mean(dim=0)
    # variance of tau m / q is tau^2 (1 - q) / q, at most tau^2 * 4 for q >= 0.2
    deviation = 2 * task_vector[0].abs() / sqrt(4000)
    assert bool(((mean - task_vector[0]).abs() <= 5 * deviation + 1e-6).all())
    undivided = (mask(task_vector) * task_vector).mean(dim=0)
    assert bool(((undivided - task_vector[0]).abs() > 5 * deviation + 1e-6).any())


def test_nothing_dropped_is_ties_without_a_trim() -> None:
    base, experts = make_models(2, torch.bfloat16)
    for rescale in ("density", "norm", "none"):
        della = merge_state_dicts(base, experts, method=Della(density=1, scaling_coefficient=1, rescale=rescale))
        assert torch.equal(flat(della), flat(merge_state_dicts(base, experts, method=Ties(density=1))))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Della(density=0.1, epsilon=0.1), "epsilon=0.1: density - epsilon"),
        (Della(density=0.95, epsilon=0.07), "epsilon"),
        (Della(epsilon=-0.1), "epsilon"),
        (Della(epsilon=float("nan")), "epsilon"),
        (Della(density=0), "density"),
        (Della(scaling_coefficient=float("nan")), "scaling_coefficient"),
    ],
)
def test_refuses_settings(method: Della, message: str) -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 5, 1000])
def test_places_are_those_of_a_stable_sort(dtype: torch.dtype, length: int) -> None:
    """Also of numbers in bfloat16, many of which are equal, of both zeros and of infinity."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, length, generator=generator).bfloat16().to(dtype)
    rows[0, : length // 2], rows[1, : length // 2], rows[2, : length // 2] = 0.0, -0.0, torch.inf
    assert torch.equal(ascending(rows), rows.abs().argsort(dim=-1, stable=True))
    assert length < 1000 or not torch.equal(
        ascending(rows), rows.argsort(dim=-1, stable=True)
    )  # control: of magnitudes
