"""A sample only saves a pass: the magnitude found is exact, or none is."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from unmergeable.merges import bracket
from unmergeable.merges.blocks import BLOCK_ELEMENTS, Scratch, tensor_operand
from unmergeable.merges.bracket import SAMPLE, bracketed_magnitudes
from unmergeable.merges.magnitudes import tensor_magnitudes

SIZE = 2 * BLOCK_ELEMENTS + 999


@cache
def task_vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SIZE, generator=generator)
    coarse = (noise * 2).round() / 2  # nine values or so
    return {
        "normal": noise,
        "heavy tails": noise**5,
        "coarse": coarse,
        "zeros": torch.zeros(SIZE),
        "mostly zeros": noise * (torch.rand(SIZE, generator=generator) < 0.05),
        "sorted": noise.sort().values,
        "bfloat16": noise.bfloat16().float(),
        "one apart": torch.full((SIZE,), 2.0).scatter_(0, torch.tensor([5]), 3.0),
        "small": noise[:1000],
        "as large as a sample": noise[:SAMPLE],
        "one more": noise[: SAMPLE + 1],
        "single": noise[:1],
    }


def search(vectors: list[Tensor], ranks: list[list[int]]) -> list[list[float | None]]:
    operands = [tensor_operand("base", torch.zeros_like(vectors[0])), *(tensor_operand("", v) for v in vectors)]
    return bracketed_magnitudes(operands, ranks, Scratch())


@pytest.mark.parametrize("name", task_vectors())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finds_what_sorting_finds(name: str, dtype: torch.dtype) -> None:
    vector = task_vectors()[name].to(dtype)
    ordered = vector.abs().sort(descending=True).values
    size = len(vector)
    ranks = sorted({1, 2, max(1, size // 1000), max(1, size // 5), max(1, size // 2), max(1, size - 1), size})
    ranks = [rank for rank in ranks if rank <= size]
    (found,) = search([vector], [ranks])
    assert found == [float(ordered[rank - 1]) for rank in ranks]


def test_experts_are_told_apart() -> None:
    vectors = [task_vectors()["normal"], task_vectors()["heavy tails"]]
    found = search(vectors, [[100], [SIZE // 3, 7]])
    ordered = [vector.abs().sort(descending=True).values for vector in vectors]
    assert found == [[float(ordered[0][99])], [float(ordered[1][SIZE // 3 - 1]), float(ordered[1][6])]]


def test_a_misleading_sample_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the sample never meets are a hundred times larger, a tenth of all."""
    vector = task_vectors()["normal"].clone()
    stride = 2 * (SIZE // SAMPLE // 2) + 1
    for offset in range(0, SIZE, BLOCK_ELEMENTS):
        block = vector[offset : offset + BLOCK_ELEMENTS]
        hidden = torch.arange(len(block)) % stride != 0
        block[hidden & (torch.arange(len(block)) % 7 == 3)] *= 100
    rank = SIZE // 20
    assert search([vector], [[rank]]) == [[None]]

    operands = [tensor_operand("base", torch.zeros_like(vector)), tensor_operand("", vector)]
    expected = float(vector.abs().sort(descending=True).values[rank - 1])
    assert tensor_magnitudes(operands, [[rank]], Scratch()) == ((expected,),)  # by the longer way
    # Control: it is the sample that gave the bracket.
    monkeypatch.setattr(bracket, "SAMPLE", SIZE)
    assert search([vector], [[rank]]) == [[expected]]


def test_few_are_kept() -> None:
    """The memory of a search is a fraction of the tensor, also where a third of it has one magnitude."""
    for name in ("normal", "coarse", "mostly zeros"):
        vector = task_vectors()[name]
        samples, _ = bracket._samples([tensor_operand("", torch.zeros(SIZE)), tensor_operand("", vector)])
        its = bracket._bracket(samples[0], SIZE // 5, SIZE)
        its.sort_in(vector.abs().numpy(), np.empty((2, SIZE), dtype=bool))
        assert sum(map(len, its.between)) < 0.03 * SIZE, name
        assert its.reaching + its.at_low + sum(map(len, its.between)) <= SIZE
        assert its.at_ends == (name != "normal")
