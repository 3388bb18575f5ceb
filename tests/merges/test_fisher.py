"""``fisher`` weighs every weight by its Fisher information."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merges.small_models import DTYPES, State, flat, make_models, rounding_bound, write_checkpoint
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, CheckpointError, Mismatch, UsageError
from unmergeable.merges import Fisher, Linear, merge, merge_state_dicts


def floats(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def make_fishers(like: State, count: int, *, seed: int = 7) -> list[State]:
    """Squares over six orders of magnitude, with a twentieth of them 0 in each."""
    generator = torch.Generator().manual_seed(seed)
    fishers = []
    for number in range(count):
        exponents = {n: -6 * torch.rand(t.shape, generator=generator) for n, t in floats(like).items()}
        keep = {n: torch.rand(t.shape, generator=generator) > 0.05 for n, t in exponents.items()}
        fishers.append({n: 10.0 ** (e + number) * keep[n] for n, e in exponents.items()})
    return fishers


def write_statistics(folder: Path, statistics: list[State]) -> str:
    for number, state in enumerate(statistics, start=1):
        place = folder / str(number)
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        save_file(state, place / "model.safetensors")
    return str(folder)


def reference(
    experts: list[State],
    fishers: list[State],
    coefficients: list[float],
    *,
    floor: float,
    favor_first: bool,
    normalize: bool,
) -> Tensor:
    """By the formula, in float64."""
    weights = []
    for number, (fisher, coefficient) in enumerate(zip(fishers, coefficients, strict=True)):
        values = flat(fisher)
        norm = float(values.norm()) if normalize else 1.0
        lifted = values.clamp_min(floor) if number == 0 or not favor_first else values
        weights.append(coefficient * lifted / norm)
    total = sum(weights)
    return sum(w * flat(e) for w, e in zip(weights, experts, strict=True)) / total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("favor_first", [True, False])
def test_equals_the_formula(tmp_path: Path, dtype: torch.dtype, normalize: bool, favor_first: bool) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32)
    fishers = make_fishers(base, 3)
    method = Fisher(
        statistics=write_statistics(tmp_path / "s", fishers), normalize=normalize, favor_first=favor_first, floor=1e-5
    )
    coefficients = [1.0, 0.5, 2.0]
    merged = flat(merge_state_dicts(base, experts, method=method, coefficients=coefficients))
    expected = reference(experts, fishers, coefficients, floor=1e-5, favor_first=favor_first, normalize=normalize)
    # The weights are relative to their sum: each product and quotient errs by a rounding of the largest operand.
    size = sum((flat(expert).abs() for expert in experts), torch.zeros(()))
    assert bool(((merged - expected).abs() <= rounding_bound(size, dtype, operations=12)).all())
    average = flat(merge_state_dicts(base, experts, method=Linear(), coefficients=coefficients))
    assert bool(((average - expected).abs() > rounding_bound(size, dtype, operations=12)).any())  # control


def test_where_nobody_knows_the_first_decides_or_all_are_averaged(tmp_path: Path) -> None:
    base, experts = make_models(3)
    nothing = [{name: torch.zeros_like(t) for name, t in floats(base).items()} for _ in experts]
    for state in nothing:
        state["scale"] = torch.tensor(1.0)  # or there would be nothing at all
    statistics = write_statistics(tmp_path / "s", nothing)
    first = merge_state_dicts(None, experts, method=Fisher(statistics=statistics))
    averaged = merge_state_dicts(None, experts, method=Fisher(statistics=statistics, favor_first=False))
    plain = merge_state_dicts(None, experts, method=Linear())
    for name in ("embed.weight", "layers.0.weight"):
        assert torch.equal(first[name], experts[0][name])
        size = sum(expert[name].abs() for expert in experts)
        assert bool(((averaged[name] - plain[name]).abs() <= 8 * 2**-24 * size).all())


def test_without_statistics_it_is_the_average() -> None:
    base, experts = make_models(2)
    merged = merge_state_dicts(base, experts, method=Fisher(), coefficients=[0.25, 0.75])
    plain = merge_state_dicts(base, experts, method=Linear(), coefficients=[0.25, 0.75])
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_equal_experts_are_returned(tmp_path: Path) -> None:
    base, (expert,) = make_models(1)
    statistics = write_statistics(tmp_path / "s", make_fishers(base, 3))
    merged = merge_state_dicts(base, [expert] * 3, method=Fisher(statistics=statistics))
    assert all(torch.equal(merged[name], expert[name]) for name in expert)


def test_files_and_any_threads_give_the_bits_of_memory(tmp_path: Path) -> None:
    base, experts = make_models(2, torch.bfloat16)
    method = Fisher(statistics=write_statistics(tmp_path / "s", make_fishers(base, 2)))
    sources = [
        (open_checkpoint(write_checkpoint(tmp_path / f"e{number}", state, shards=number + 1)), None)
        for number, state in enumerate(experts)
    ]
    expected = merge_state_dicts(None, experts, method=method)
    for threads in (1, 3):
        out = tmp_path / f"out-{threads}"
        merge(None, sources, method, out, threads=threads)
        written = open_checkpoint(out)
        assert all(torch.equal(written.tensor(name), expected[name]) for name in expected)


def test_refuses_statistics_of_other_experts(tmp_path: Path) -> None:
    base, experts = make_models(2)
    fishers = make_fishers(base, 3)

    def merged(name: str, statistics: list[State]) -> None:
        merge_state_dicts(base, experts, method=Fisher(statistics=write_statistics(tmp_path / name, statistics)))

    merged("right", fishers[:2])  # control
    with pytest.raises(CheckpointError, match=r"fewer/2"):
        merged("fewer", fishers[:1])
    with pytest.raises(Mismatch, match="statistics of more than 2 experts"):
        merged("more", fishers)
    lacking = {name: tensor for name, tensor in fishers[1].items() if name != "scale"}
    with pytest.raises(Mismatch, match=r"scale: not in statistics 2"):
        merged("lacking", [fishers[0], lacking])
    with pytest.raises(Mismatch, match=r"scale: \[\] in expert 1 but \[2\] in statistics 2"):
        merged("shape", [fishers[0], {**fishers[1], "scale": torch.zeros(2)}])
    with pytest.raises(BadInput, match=r"statistics 2: the Fisher information has the norm nan"):
        merged("nan", [fishers[0], {**fishers[1], "scale": torch.tensor(torch.nan)}])
    with pytest.raises(BadInput, match=r"statistics 1: the Fisher information has the norm 0.0"):
        merged("zero", [{name: torch.zeros_like(t) for name, t in fishers[0].items()}, fishers[1]])


@pytest.mark.parametrize(
    ("method", "coefficients", "message"),
    [
        (Fisher(floor=0), None, "floor=0: must be positive"),
        (Fisher(examples=0), None, "examples=0: at least one"),
        (Fisher(), [1.0, -1.0], "must be positive"),
        (Fisher(), [0.0, 0.0], "must be positive"),
    ],
)
def test_refuses_settings(method: Fisher, coefficients: list[float | None] | None, message: str) -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method, coefficients=coefficients)
