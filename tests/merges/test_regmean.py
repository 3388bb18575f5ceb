"""``regmean`` repeats what the experts' linear layers do on their own inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merges.small_models import State
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges import Linear, RegMean, merge_state_dicts
from unmergeable.merges.regmean import RIDGE, fit_matrices

INPUTS, OUTPUTS, ROWS = 12, 7, 200


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(count: int, *, alive: int = INPUTS) -> list[Tensor]:
    """Inputs of each expert, correlated in its own way; those from ``alive`` on are always 0."""
    mixed = [normal(ROWS, INPUTS, seed=n) @ normal(INPUTS, INPUTS, seed=100 + n) for n in range(count)]
    for inputs in mixed:
        inputs[:, alive:] = 0
    return mixed


def gram(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def write_grams(folder: Path, grams: list[State]) -> str:
    for number, state in enumerate(grams, start=1):
        place = folder / str(number)
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        save_file({name: tensor.float().contiguous() for name, tensor in state.items()}, place / "model.safetensors")
    return str(folder)


def test_is_the_least_squares_solution() -> None:
    """Against a solver that sees the inputs themselves, stacked."""
    inputs = make_inputs(3)
    matrices = [normal(INPUTS, OUTPUTS, seed=200 + n) for n in range(3)]
    coefficients = [1.0, 0.5, 2.0]
    fitted = fit_matrices(matrices, [gram(x) for x in inputs], coefficients)
    stacked = torch.cat([(c**0.5) * x for c, x in zip(coefficients, inputs, strict=True)])
    answers = torch.cat([(c**0.5) * x @ m for c, x, m in zip(coefficients, inputs, matrices, strict=True)])
    expected = torch.linalg.lstsq(stacked, answers).solution
    # The ridge pulls by at most its ratio to the smallest eigenvalue times the distance to the average.
    total = sum(c * gram(x) for c, x in zip(coefficients, inputs, strict=True))
    smallest = float(torch.linalg.eigvalsh(total).min())
    average = sum(c * m for c, m in zip(coefficients, matrices, strict=True)) / sum(coefficients)
    pull = RIDGE * float(total.diagonal().mean()) / smallest * float((expected - average).norm())
    assert float((fitted - expected).norm()) <= 1.01 * pull + 1e-9
    assert float((average - expected).norm()) > 100 * pull  # control


def test_equal_inputs_give_the_average_and_one_informed_expert_decides() -> None:
    (inputs,) = make_inputs(1)
    matrices = [normal(INPUTS, OUTPUTS, seed=n) for n in range(2)]
    fitted = fit_matrices(matrices, [gram(inputs)] * 2, [1.0, 1.0])
    assert torch.allclose(fitted, (matrices[0] + matrices[1]) / 2, rtol=0, atol=1e-10)
    agreed = fit_matrices([matrices[0]] * 2, [gram(x) for x in make_inputs(2)], [1.0, 1.0])
    assert torch.equal(agreed, matrices[0])
    decided = fit_matrices(matrices, [gram(inputs), torch.zeros(INPUTS, INPUTS, dtype=torch.float64)], [1.0, 1.0])
    assert float((decided - matrices[0]).norm()) < 1e-2 * float((matrices[1] - matrices[0]).norm())


def test_dead_inputs_have_their_weights_averaged() -> None:
    alive = 9
    grams = [gram(x) for x in make_inputs(2, alive=alive)]
    matrices = [normal(INPUTS, OUTPUTS, seed=n) for n in range(2)]
    fitted = fit_matrices(matrices, grams, [1.0, 3.0])
    average = (matrices[0] + 3 * matrices[1]) / 4
    assert torch.allclose(fitted[alive:], average[alive:], rtol=0, atol=1e-9)
    assert not torch.allclose(fitted[:alive], average[:alive], rtol=0, atol=1e-2)  # control
    nothing = [torch.zeros(INPUTS, INPUTS, dtype=torch.float64)] * 2
    assert torch.allclose(fit_matrices(matrices, nothing, [1.0, 3.0]), average, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [0.9, 1.0, 0.0])
def test_layers_of_both_orientations_are_fitted_and_the_rest_averaged(
    tmp_path: Path, dtype: torch.dtype, alpha: float
) -> None:
    grams = [gram(x).float().double() for x in make_inputs(2)]
    experts: list[State] = [
        {
            "linear.weight": normal(OUTPUTS, INPUTS, seed=n).to(dtype),
            "linear.bias": normal(OUTPUTS, seed=10 + n).to(dtype),
            "conv1d.weight": normal(INPUTS, INPUTS, seed=20 + n).to(dtype),
        }
        for n in range(2)
    ]
    keys = ("linear.weight/1", "conv1d.weight/0")
    statistics = write_grams(tmp_path / "s", [dict.fromkeys(keys, g) for g in grams])
    merged = merge_state_dicts(
        None, experts, method=RegMean(statistics=statistics, alpha=alpha), coefficients=[1.0, 2.0]
    )
    scaled = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in grams]
    for name, transpose in (("linear.weight", True), ("conv1d.weight", False)):
        matrices = [expert[name].double().T if transpose else expert[name].double() for expert in experts]
        expected = fit_matrices(matrices, scaled, [1.0, 2.0])
        expected = expected.T if transpose else expected
        # One rounding to the stored dtype; float64 solves of the same matrices agree to epsilon times their condition.
        bound = torch.finfo(dtype).eps * expected.abs() + 1e-8
        assert bool(((merged[name].double() - expected).abs() <= bound).all())
    plain = merge_state_dicts(None, experts, method=Linear(), coefficients=[1.0, 2.0])
    assert torch.equal(merged["linear.bias"], plain["linear.bias"])
    assert not torch.equal(merged["linear.weight"], plain["linear.weight"])  # control
    without = merge_state_dicts(None, experts, method=RegMean(alpha=alpha), coefficients=[1.0, 2.0])
    assert all(torch.equal(without[name], plain[name]) for name in plain)


def test_refuses(tmp_path: Path) -> None:
    experts = [{"linear.weight": normal(OUTPUTS, INPUTS, seed=n).float()} for n in range(2)]
    right = gram(make_inputs(1)[0])

    def merged(name: str, keys: list[str], matrix: Tensor = right) -> None:
        grams = [dict.fromkeys(keys, right), dict.fromkeys(keys, matrix)]
        merge_state_dicts(None, experts, method=RegMean(statistics=write_grams(tmp_path / name, grams)))

    merged("right", ["linear.weight/1"])  # control
    with pytest.raises(BadInput, match="statistics 1: no Gram matrix of any tensor that is merged"):
        merged("other", ["other.weight/1"])
    with pytest.raises(
        Mismatch, match=r"linear.weight: its Gram matrix in statistics 1 is \[12, 12\], the weight \[7, 12\]"
    ):
        merged("axis", ["linear.weight/0"])
    with pytest.raises(Mismatch, match=r"linear.weight: its Gram matrix in statistics 2 is \[3, 3\]"):
        merged("shape", ["linear.weight/1"], torch.eye(3))
    with pytest.raises(BadInput, match=r"linear.weight: statistics 2 holds NaN"):
        merged("nan", ["linear.weight/1"], torch.full((INPUTS, INPUTS), torch.nan))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"alpha=.*must lie in \[0, 1\]"):
            merge_state_dicts(None, experts, method=RegMean(alpha=alpha))
