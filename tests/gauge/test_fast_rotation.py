"""A rotation in factors is a rotation, mixes everything, and is applied as its matrix is."""

from __future__ import annotations

import math

import pytest
import torch

from unmergeable.architecture.symmetry import Group, Space, Variance
from unmergeable.gauge.elements import Kronecker
from unmergeable.gauge.groups import LARGEST_FACTOR, contains, factor_sizes, fast_rotation, hadamard
from unmergeable.randomness import Stream

EPSILON = torch.finfo(torch.float64).eps
SIZES = [1, 2, 7, 48, 64, 96, 128, 576]


def rotation(size: int, blocks: int = 1) -> tuple[Space, Kronecker]:
    space = Space("stream", "residual", Group("orthogonal"), blocks, size)
    return space, fast_rotation(space, Stream.from_seed(3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_it_is_orthogonal(size: int, blocks: int) -> None:
    space, element = rotation(size, blocks)

    assert contains(space, element, tolerance=16 * size * EPSILON)
    # Control: another scale of one coordinate is none.
    scale = element.monomial.scale.clone()
    scale[0, 0] *= 1 + 1e-6
    assert not contains(space, Kronecker(element.factors, type(element.monomial)(element.monomial.index, scale)))


@pytest.mark.parametrize("size", [7, 48, 576])
def test_every_coordinate_reaches_every_other(size: int) -> None:
    matrix = rotation(size)[1].matrix()[0]

    assert float(matrix.abs().min()) > 0
    # No coordinate keeps to itself, as it would under a permutation.
    assert float(matrix.abs().max()) < 0.95


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("inner", [1, 5])
@pytest.mark.parametrize("variance", ["vector", "covector"])
def test_it_acts_as_its_matrix(size: int, blocks: int, inner: int, variance: Variance) -> None:
    _, element = rotation(size, blocks)
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(4, blocks, 2, size, inner, generator=generator, dtype=torch.float64)
    expected = torch.einsum("bij,obsjk->obsik", element.matrix(), coordinates)
    bound = 16 * size * EPSILON * float(coordinates.abs().max()) * math.sqrt(size)

    assert float((element.apply(coordinates, variance) - expected).abs().max()) <= bound
    there_and_back = element.inverse().apply(element.apply(coordinates, variance), variance)
    assert float((there_and_back - coordinates).abs().max()) <= bound
    if size > 1:
        assert not torch.equal(element.apply(coordinates, variance), coordinates)


def test_the_inverse_is_the_transpose() -> None:
    _, element = rotation(48)

    assert torch.allclose(element.inverse().matrix(), element.matrix().mT, rtol=0, atol=48 * EPSILON)
    assert element.inverse().inverse().matrix().equal(element.matrix())


def test_the_factors_multiply_to_the_size() -> None:
    for size in range(1, 700):
        sizes = factor_sizes(size)
        odd = size // (size & -size)

        assert math.prod(sizes) == size
        assert all(factor <= LARGEST_FACTOR for factor in sizes if factor != odd)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_hadamard(size: int) -> None:
    matrix = hadamard(size)

    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=size * EPSILON)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(size)), rtol=1e-15, atol=0)


def test_only_a_folded_gain_commutes_with_it() -> None:
    _, element = rotation(8)
    gain = torch.full((1, 1, 8, 1), 2.0, dtype=torch.float64)

    assert element.apply(gain, "gain").equal(gain)
    gain[0, 0, 3] = 1
    with pytest.raises(AssertionError, match="gain is not folded"):
        element.apply(gain, "gain")
