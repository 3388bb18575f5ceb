"""Random masks depend on seed, expert and tensor alone, and keep the fraction they are asked for."""

from math import sqrt

import pytest
import torch
from torch import Tensor

from unmergeable.merges.blocks import BLOCK_ELEMENTS, Operand, Scratch, tensor_operand
from unmergeable.merges.masks import bernoulli_mask, draws, l1_ratios, mask_stream, remembered

STREAM = mask_stream(0, 1, "layers.0.weight")
LENGTH = 3 * BLOCK_ELEMENTS + 12_345
FIRST_DRAWS = [290325464, 1005977954, 554687682, -1688390433]


def read(operand: Operand, size: int = BLOCK_ELEMENTS) -> Tensor:
    return torch.cat([block.clone() for block in operand.read(size)])


def mask(density: float, *, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Operand:
    return bernoulli_mask(STREAM, density, tensor_operand("expert", torch.zeros(length, dtype=dtype)))


@pytest.mark.parametrize("size", [BLOCK_ELEMENTS, 1000, 77_777, LENGTH, 7])
def test_a_draw_belongs_to_its_weight_not_to_its_block(size: int) -> None:
    whole = draws(STREAM, 0, 5000)
    assert torch.equal(
        torch.cat([draws(STREAM, start, min(size, 5000 - start)) for start in range(0, 5000, size)]), whole
    )
    if size > 100:
        assert torch.equal(read(mask(0.3), size), read(mask(0.3)))


def test_draws_are_the_same_on_every_platform() -> None:
    """Frozen: another numpy, or a byte order, must not change a published merge."""
    assert draws(STREAM, 0, 4).tolist() == FIRST_DRAWS
    assert draws(STREAM, 3, 1).tolist() == FIRST_DRAWS[3:]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999])
def test_keeps_the_fraction_asked_for(density: float) -> None:
    kept = float(read(mask(density)).mean())
    deviation = sqrt(density * (1 - density) / LENGTH)
    assert abs(kept - density) < 5 * deviation
    assert abs(kept - 1.1 * density) > 5 * deviation or density > 0.9  # control: another density is told apart


def test_a_mask_holds_zeros_and_ones_in_the_compute_dtype() -> None:
    for stored, compute in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        values = read(mask(0.5, length=100, dtype=stored))
        assert values.dtype == compute
        assert set(values.tolist()) == {0.0, 1.0}
    assert read(mask(1.0)).min() == 1


def test_weights_are_dropped_independently() -> None:
    """Neighbours, experts, tensors and seeds: the fraction kept in both is the product of the fractions."""
    first = read(mask(0.5))
    like = tensor_operand("expert", torch.zeros(LENGTH))
    others = {
        "neighbour": first.roll(1),
        "half a word": first.roll(2),
        "expert": read(bernoulli_mask(mask_stream(0, 2, "layers.0.weight"), 0.5, like)),
        "tensor": read(bernoulli_mask(mask_stream(0, 1, "layers.1.weight"), 0.5, like)),
        "seed": read(bernoulli_mask(mask_stream(1, 1, "layers.0.weight"), 0.5, like)),
    }
    for name, other in others.items():
        assert abs(float((first * other).mean()) - 0.25) < 5 * sqrt(0.25 * 0.75 / LENGTH), name
    assert abs(float((first * first).mean()) - 0.25) > 0.2  # control


def test_a_larger_density_keeps_what_a_smaller_one_keeps() -> None:
    small, large = read(mask(0.2)), read(mask(0.3))
    assert bool((small <= large).all())


@pytest.mark.parametrize("length", [1, 8, 13, BLOCK_ELEMENTS, LENGTH])
def test_a_remembered_mask_is_the_mask(length: int) -> None:
    expected = read(mask(0.3, length=length))
    again = remembered(mask(0.3, length=length))
    for _ in range(3):
        assert torch.equal(read(again), expected)
    assert read(again).dtype == expected.dtype


def test_l1_ratios() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)
    expert = base + torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.bfloat16)
    operands = [tensor_operand("", tensor) for tensor in (base, expert, expert, base)]
    kept, nothing = (tensor_operand("", torch.tensor(values)) for values in ([1.0, 0.0, 1.0, 0.0], [0.0] * 4))
    assert l1_ratios(operands, [kept, nothing, kept], Scratch()) == (4 / 1.5, 1, 1)
