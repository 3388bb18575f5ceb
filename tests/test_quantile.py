"""The streamed k-th largest magnitude is exact, whatever the values and however the stream is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmergeable.quantile import DIGITS, KthLargest, magnitude_bits


def kth_largest(values: Tensor, rank: int, dtype: torch.dtype, *, pieces: int = 1) -> float:
    search = KthLargest(rank, dtype)
    while not search.is_settled:
        counts = torch.zeros(DIGITS, dtype=torch.int64)
        for piece in values.tensor_split(pieces):
            counts += search.count(piece)
        search = search.narrow(counts)
    return search.value


def reference(values: Tensor, rank: int) -> float:
    magnitudes = values.double().abs()
    return float(magnitudes.kthvalue(len(magnitudes) - rank + 1).values)


def cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(10_001, generator=generator)
    denormal = torch.finfo(torch.float32).smallest_normal / 2**23  # 2^-149, the smallest float32 above zero
    return {
        "normal": noise,
        "one value": torch.full((1000,), -2.5),
        "zeros": torch.zeros(1000),
        "mostly zeros": noise * (torch.rand(10_001, generator=generator) < 0.1),
        "few values": noise.mul(3).round(),
        "bf16 differences": (noise.bfloat16().float() + 0.01 * noise.flip(0)).bfloat16().float()
        - noise.bfloat16().float(),
        "denormals": torch.arange(-500, 500).float() * denormal,
        "neighbours": torch.tensor([1.0])
        .view(torch.int32)
        .add(torch.arange(1000, dtype=torch.int32))
        .view(torch.float32),
        "around a digit": torch.arange(0x3F7FFFF0, 0x3F800010, dtype=torch.int32).view(torch.float32),
        "infinities": torch.cat([noise[:50], torch.tensor([torch.inf, -torch.inf])]),
        "one element": noise[:1],
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_kthvalue(name: str, dtype: torch.dtype) -> None:
    values = cases()[name]
    for rank in {1, 2, len(values) // 5, len(values) // 2, len(values) - 1, len(values)}:
        if 1 <= rank <= len(values):
            assert kth_largest(values, rank, dtype) == reference(values, rank)


def test_settles_all_64_bits() -> None:
    values = 1 + torch.arange(1000, dtype=torch.float64) * torch.finfo(torch.float64).eps
    assert kth_largest(values, 400, torch.float64) == reference(values, 400)
    # Control: the same values are equal in float32, so a search of 32 bits could not have told them apart.
    assert kth_largest(values, 400, torch.float32) == 1.0


@settings(deadline=None, max_examples=50)  # every pass has 2^16 counters, however few the values
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    rank=st.integers(min_value=1, max_value=60),
    pieces=st.integers(min_value=1, max_value=7),
)
def test_any_values_any_cut(values: list[float], rank: int, pieces: int) -> None:
    tensor = torch.tensor(values)
    rank = min(rank, len(values))
    assert kth_largest(tensor, rank, torch.float32, pieces=pieces) == reference(tensor, rank)


def test_order_of_the_stream_does_not_matter() -> None:
    values = cases()["normal"]
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(6))]
    search = KthLargest(2000)
    assert torch.equal(search.count(values), search.count(shuffled))
    assert kth_largest(values, 2000, torch.float32) == kth_largest(shuffled, 2000, torch.float32, pieces=13)


@pytest.mark.parametrize("name", ["normal", "few values", "bf16 differences", "mostly zeros"])
def test_keeps_at_least_rank_and_only_equals_beyond_it(name: str) -> None:
    magnitudes = cases()[name].abs()
    rank = len(magnitudes) // 5
    threshold = kth_largest(magnitudes, rank, torch.float32)
    assert int((magnitudes > threshold).sum()) < rank <= int((magnitudes >= threshold).sum())


def test_bits_order_as_magnitudes_do() -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, -1.5, torch.inf, torch.nan])
    bits = magnitude_bits(values)
    assert bits[0] == bits[1] == 0
    assert bool((bits[1:].diff() > 0).all())


def test_a_value_is_not_read_before_it_is_known() -> None:
    with pytest.raises(AssertionError, match="32 bits"):
        _ = KthLargest(1).value
