"""Blocks of any size hold the tensor's elements in order."""

import pytest
import torch

from unmergeable.merges.blocks import (
    BLOCK_ELEMENTS,
    Scratch,
    regrouped,
    row_length,
    tensor_operand,
    whole_rows,
    whole_tensor,
    widened_blocks,
)


@pytest.mark.parametrize("size", [1, 3, 7, 100, 1000])
@pytest.mark.parametrize("cut", [1, 4, 7, 250, 1000])
def test_regrouped(size: int, cut: int) -> None:
    values = torch.arange(1000)
    blocks = list(regrouped(values.split(cut), size))
    assert torch.equal(torch.cat(blocks), values)
    assert all(len(block) == size for block in blocks[:-1])
    assert 0 < len(blocks[-1]) <= size
    assert list(regrouped([], size)) == []


def test_rows() -> None:
    assert [row_length(shape) for shape in ((), (7,), (3, 5), (4, 2, 3), (0, 4), (4, 0))] == [1, 7, 5, 6, 4, 1]
    assert whole_rows(1000) % 1000 == 0
    assert BLOCK_ELEMENTS - 1000 < whole_rows(1000) <= BLOCK_ELEMENTS
    assert whole_rows(BLOCK_ELEMENTS + 1) == BLOCK_ELEMENTS + 1


def test_a_block_may_be_longer_than_usual() -> None:
    size = BLOCK_ELEMENTS + 5
    operand = tensor_operand("", torch.arange(2.0 * size))
    scratch = Scratch()
    usual = [len(blocks[0]) for blocks, _ in widened_blocks([operand], scratch)]
    long = [len(blocks[0]) for blocks, _ in widened_blocks([operand], scratch, size=size)]
    assert (usual, long) == ([BLOCK_ELEMENTS, BLOCK_ELEMENTS, 10], [size, size])


def test_whole_tensor() -> None:
    tensor = torch.randn(530, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(whole_tensor(tensor_operand("", tensor)), tensor.float())
    assert whole_tensor(tensor_operand("", torch.tensor(2.0, dtype=torch.float64))).dtype == torch.float64
