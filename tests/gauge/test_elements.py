"""Elements act as the matrices they stand for, on every shape of coordinates, and form groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmergeable.architecture.symmetry import Variance
from unmergeable.gauge.elements import Dense, Element, Monomial, Rotary, compose, pair_indices, split_pairs
from unmergeable.gauge.groups import haar, log_uniform
from unmergeable.randomness import Stream

EPSILON = torch.finfo(torch.float64).eps
CONDITION = 100.0
laws = settings(max_examples=60, deadline=None, derandomize=True)

KINDS = ("dense", "monomial", "signed permutation", "rotary half", "rotary interleaved")
SEEDS = st.integers(0, 10**6)
BLOCKS = st.integers(1, 3)
SIZES = st.integers(1, 4).map(lambda pairs: 2 * pairs)


def element(kind: str, blocks: int, size: int, seed: int) -> Element:
    stream = Stream.from_seed(seed).child(kind)
    scale = log_uniform((blocks, size), CONDITION, stream.child("scale"))
    index = torch.from_numpy(stream.child("index").permutations(blocks, size))
    signs = torch.from_numpy(stream.child("signs").signs(blocks, size))
    if kind == "dense":
        rotation = haar(blocks, size, stream.child("left"))
        return Dense(rotation @ torch.diag_embed(scale) @ haar(blocks, size, stream.child("right")))
    if kind == "monomial":
        return Monomial(index, scale * signs)
    if kind == "signed permutation":
        return Monomial(index, signs)
    phase = 2 * math.pi * torch.from_numpy(stream.child("phase").uniform(blocks, size // 2))
    modulus = log_uniform((blocks, size // 2), CONDITION, stream.child("modulus"))
    return Rotary(torch.polar(modulus, phase), "half" if kind.endswith("half") else "interleaved")


ELEMENTS = st.builds(element, st.sampled_from(KINDS), BLOCKS, SIZES, SEEDS)


def representation(matrix: Tensor, variance: Variance) -> Tensor:
    """The matrix by which coordinates of this variance change."""
    if variance == "vector":
        return matrix
    return torch.linalg.inv(matrix).mT if variance == "covector" else matrix.abs()


def rounding(*factors: Tensor) -> float:
    """A bound on the rounding error of a short product: epsilon, the inner length, the norms; 16 for a few steps."""
    size = factors[0].shape[-1]
    norm = math.prod(max(1.0, float(torch.linalg.matrix_norm(factor, ord=2).max())) for factor in factors)
    return 16 * EPSILON * size * CONDITION * norm


@laws
@given(
    kind=st.sampled_from(KINDS),
    blocks=BLOCKS,
    size=SIZES,
    seed=SEEDS,
    outer=st.integers(1, 3),
    spectators=st.lists(st.integers(1, 3), max_size=2),
    inner=st.integers(1, 4),
    variance=st.sampled_from(["vector", "covector", "gain"]),
    layout=st.sampled_from(["contiguous", "strided", "reversed axes"]),
)
def test_acting_is_multiplying_by_the_matrix(
    kind: str,
    blocks: int,
    size: int,
    seed: int,
    outer: int,
    spectators: list[int],
    inner: int,
    variance: Variance,
    layout: str,
) -> None:
    if variance == "gain" and kind != "signed permutation":
        return
    acting = element(kind, blocks, size, seed)
    shape = (outer, blocks, *spectators, size, inner)
    numbers = torch.from_numpy(Stream.from_seed(seed).child("x").normal(*shape, 2))
    if layout == "contiguous":
        coordinates = numbers[..., 0].contiguous()
    elif layout == "strided":
        coordinates = numbers[..., 0]
    else:
        backwards = range(len(shape) - 1, -1, -1)
        coordinates = numbers[..., 0].permute(*backwards).contiguous().permute(*backwards)
    before = coordinates.clone()

    found = acting.apply(coordinates, variance)

    matrix = representation(acting.matrix(), variance)
    flat = before.reshape(outer, blocks, -1, size, inner)
    expected = torch.einsum("bij,obsjn->obsin", matrix, flat).reshape(shape)
    assert found.shape == shape
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= rounding(matrix) * before.abs().max()
    assert torch.equal(coordinates, before)


@laws
@given(ELEMENTS)
def test_an_inverse_undoes(acting: Element) -> None:
    matrix, inverse = acting.matrix(), acting.inverse().matrix()
    neutral = torch.eye(matrix.shape[-1], dtype=torch.float64)
    assert (inverse @ matrix - neutral).abs().max() <= rounding(matrix, inverse)
    assert (matrix @ inverse - neutral).abs().max() <= rounding(matrix, inverse)
    assert (acting.inverse().inverse().matrix() - matrix).abs().max() <= rounding(matrix, inverse)
    assert type(acting.inverse()) is type(acting)


@laws
@given(acting=ELEMENTS, seed=SEEDS)
def test_vectors_and_covectors_keep_their_products(acting: Element, seed: int) -> None:
    """What makes attention scores survive: (A q) . (A^-T k) = q . k."""
    blocks, size, _ = acting.matrix().shape
    queries, keys = torch.from_numpy(Stream.from_seed(seed).normal(2, 1, blocks, size, 5))
    moved = acting.apply(queries, "vector") * acting.apply(keys, "covector")
    bound = rounding(acting.matrix(), acting.inverse().matrix()) * float(queries.norm() * keys.norm())
    assert (moved.sum(-2) - (queries * keys).sum(-2)).abs().max() <= bound


@laws
@given(kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)), blocks=BLOCKS, size=SIZES, seed=SEEDS)
def test_composing_is_multiplying_matrices(kinds: tuple[str, str], blocks: int, size: int, seed: int) -> None:
    first, second = (element(kind, blocks, size, seed + place) for place, kind in enumerate(kinds))
    both = compose(second, first)
    expected = second.matrix() @ first.matrix()
    assert (both.matrix() - expected).abs().max() <= rounding(first.matrix(), second.matrix())
    # A group element stays cheap to apply: only unlike kinds become dense.
    is_alike = type(first) is type(second) and getattr(first, "pairing", None) == getattr(second, "pairing", None)
    assert isinstance(both, type(first) if is_alike else Dense)


def test_the_order_of_composing_matters() -> None:
    """The control of the test above."""
    first, second = element("dense", 1, 4, 1), element("monomial", 1, 4, 2)
    swapped = first.matrix() @ second.matrix()
    assert not torch.allclose(compose(second, first).matrix(), swapped, rtol=0, atol=1e-3)


@laws
@given(ELEMENTS)
def test_condition_is_that_of_the_matrix(acting: Element) -> None:
    values = torch.linalg.svdvals(acting.matrix())
    expected = float((values[:, 0] / values[:, -1]).max())
    assert acting.condition() == pytest.approx(expected, rel=64 * EPSILON * CONDITION)
    assert acting.condition() == pytest.approx(acting.inverse().condition(), rel=64 * EPSILON * CONDITION)


def test_condition_is_that_of_the_worst_block_and_not_of_all_together() -> None:
    scale = torch.tensor([[1.0, 2.0], [100.0, 300.0]], dtype=torch.float64)
    index = torch.tensor([[0, 1], [1, 0]])
    assert Monomial(index, scale).condition() == 3
    assert Dense(Monomial(index, scale).matrix()).condition() == pytest.approx(3)
    assert Rotary(torch.tensor([[1, 2j], [100, -300]], dtype=torch.complex128), "half").condition() == 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "signed permutation"])
def test_a_gain_follows_signed_permutations_only(kind: str) -> None:
    with pytest.raises(AssertionError, match="gain"):
        element(kind, 1, 4, 0).apply(torch.ones(1, 1, 4, 1, dtype=torch.float64), "gain")


def test_a_rotary_element_multiplies_complex_numbers() -> None:
    values = torch.tensor([[2j, 1 + 1j]], dtype=torch.complex128)
    half, interleaved = Rotary(values, "half"), Rotary(values, "interleaved")
    # Half-split: (x0, x2) and (x1, x3) are numbers; interleaved: (x0, x1) and (x2, x3).
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 1, 4, 1)
    assert half.apply(x, "vector").flatten().tolist() == [-6.0, -2.0, 2.0, 6.0]
    assert interleaved.apply(x, "vector").flatten().tolist() == [-4.0, 2.0, -1.0, 7.0]


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("size", [2, 4, 10])
def test_pairs_are_the_same_by_index_and_by_view(pairing: Any, size: int) -> None:
    numbers = torch.arange(float(3 * size)).view(1, 1, size, 3)
    for indices, view in zip(pair_indices(size, pairing), split_pairs(numbers, pairing), strict=True):
        assert torch.equal(numbers[:, :, indices], view)
    first, second = pair_indices(size, pairing)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(size))


def test_the_matrix_of_a_covector_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor comes in many pieces; inverting for each would cost more than applying."""
    inverted: list[Tensor] = []
    invert = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda matrix: inverted.append(matrix) or invert(matrix))
    acting = element("dense", 2, 4, 0)
    for _ in range(3):
        acting.apply(torch.ones(1, 2, 4, 1, dtype=torch.float64), "covector")
    assert len(inverted) == 1
