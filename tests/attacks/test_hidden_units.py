"""Hidden units are known by a sample of their weights, and by all of them where that leaves a doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unmergeable.architecture import FeedForward
from unmergeable.architecture.blocks import Heads
from unmergeable.attacks.hidden_units import SAMPLE, UnitSimilarity, match_units, permuted_similarity, unit_similarity
from unmergeable.attacks.matching import match

SIZE = WIDTH = 4 * SAMPLE
FUSED = FeedForward(
    "mlp", SIZE, Heads("both", None, 0, SIZE, 0), Heads("down", None, 1, 0, 0), Heads("both", None, 0, 0, 0)
)
PLAIN = FeedForward("mlp", SIZE, Heads("up", "up.bias", 0, 0, 0), Heads("down", None, 1, 0, 0))
RELU = replace(PLAIN, activation="relu")
BLOCKS = pytest.mark.parametrize(
    ("block", "similarity"), [(FUSED, unit_similarity), (RELU, unit_similarity), (PLAIN, permuted_similarity)]
)


class Counting:
    """A similarity that says of how many weights and units it was asked."""

    def __init__(self, similarity: UnitSimilarity) -> None:
        self._similarity = similarity
        self.asked: list[tuple[int, int]] = []

    def __call__(self, block: FeedForward, protected: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
        self.asked.append((block.size, protected[block.down.weight].shape[1]))
        return self._similarity(block, protected, base)


def drawn(block: FeedForward, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down": (WIDTH, SIZE)}
    shapes |= {"both": (2 * SIZE, WIDTH)} if block.gate is not None else {"up": (SIZE, WIDTH), "up.bias": (SIZE,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ordered(block: FeedForward, tensors: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Unit ``order[i]`` in place ``i``."""
    rows = torch.cat([order, SIZE + order])
    return {
        name: tensor[:, order] if name == "down" else tensor[rows if name == "both" else order]
        for name, tensor in tensors.items()
    }


@BLOCKS
def test_a_sample_is_enough_where_units_are_their_own(block: FeedForward, similarity: UnitSimilarity) -> None:
    base, task = drawn(block, 0), drawn(block, 1)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    expert = {name: base[name] + 0.3 * task[name] for name in base}
    counting = Counting(similarity)

    found = match_units(block, ordered(block, expert, order), base, counting)

    assert torch.equal(order[found.permutation.index[0]], torch.arange(SIZE))
    assert counting.asked == [(SIZE, SAMPLE)]
    assert found.margin > 0.5


@BLOCKS
def test_units_alike_are_told_apart_by_all_weights(block: FeedForward, similarity: UnitSimilarity) -> None:
    """A quarter of the units are copies of others but for a little, which no sample shows."""
    base = drawn(block, 0)
    alike = SIZE // 8
    places = torch.cat([torch.arange(alike), torch.arange(alike), torch.arange(2 * alike, SIZE)])
    copies = ordered(block, base, places)
    little = drawn(block, 1)
    base = {name: copies[name] + 0.2 * little[name] for name in copies}
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    protected = ordered(block, base, order)
    counting = Counting(similarity)

    found = match_units(block, protected, base, counting)

    assert torch.equal(order[found.permutation.index[0]], torch.arange(SIZE))
    assert counting.asked == [(SIZE, SAMPLE), (2 * alike, WIDTH)]


@BLOCKS
def test_a_base_it_has_nothing_to_do_with_is_compared_whole(block: FeedForward, similarity: UnitSimilarity) -> None:
    protected, base = drawn(block, 0), drawn(block, 1)
    counting = Counting(similarity)

    found = match_units(block, protected, base, counting)

    expected = match(similarity(block, protected, base))
    assert torch.equal(found.permutation.index, expected.permutation.index)
    assert found.margin == expected.margin
    assert counting.asked == [(SIZE, SAMPLE), (SIZE, WIDTH)]


def test_small_blocks_are_compared_whole() -> None:
    small = replace(PLAIN, size=8)
    generator = torch.Generator().manual_seed(0)
    base = {"up": torch.randn(8, 6, generator=generator), "up.bias": torch.randn(8, generator=generator)}
    base["down"] = torch.randn(6, 8, generator=generator)
    counting = Counting(permuted_similarity)

    match_units(small, base, base, counting)

    assert counting.asked == [(8, 6)]
