"""What is drawn from a group belongs to it, has the condition number asked for, and is spread as the docstring says."""

from __future__ import annotations

import cmath
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmergeable.architecture.symmetry import Group, GroupKind, Pairing, Space
from unmergeable.gauge.elements import Dense, Monomial, Rotary, compose
from unmergeable.gauge.groups import contains, haar, identity, log_uniform, sample
from unmergeable.randomness import Stream

EPSILON = torch.finfo(torch.float64).eps
CHANCE = 1e-9  # the probability with which each statistical bound below would be exceeded by luck
KINDS: tuple[GroupKind, ...] = get_args(GroupKind)
PAIRED = {"rotary", "quarter_turn", "pair_sign", "pair_scale"}
laws = settings(max_examples=80, deadline=None, derandomize=True)


def space(kind: GroupKind, blocks: int = 3, size: int = 8, pairing: Pairing = "half") -> Space:
    return Space("s", "query_key", Group(kind, pairing if kind in PAIRED else None), blocks, size)


SPACES = st.builds(
    space,
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.integers(1, 5).map(lambda pairs: 2 * pairs),
    st.sampled_from(["half", "interleaved"]),
)
STREAMS = st.integers(0, 10**6).map(Stream.from_seed)
CONDITIONS = st.sampled_from([1.0, 1.5, 4.0, 100.0, 1000.0])


@laws
@given(space=SPACES, stream=STREAMS, condition=CONDITIONS)
def test_samples_belong_to_their_group(space: Space, stream: Stream, condition: float) -> None:
    element = sample(space, stream, condition)
    assert contains(space, element)
    assert contains(space, identity(space))
    assert element.condition() <= condition * (1 + 64 * EPSILON)
    assert element.matrix().dtype == torch.float64


@laws
@given(space=SPACES, stream=STREAMS)
def test_groups_are_closed(space: Space, stream: Stream) -> None:
    first, second = (sample(space, stream.child(label), 4.0) for label in "ab")
    assert contains(space, compose(second, first))
    assert contains(space, first.inverse())
    assert torch.equal(compose(identity(space), first).matrix(), first.matrix())


@laws
@given(space=SPACES, stream=STREAMS)
def test_condition_one_leaves_isometries(space: Space, stream: Stream) -> None:
    matrix = sample(space, stream, 1.0).matrix()
    neutral = torch.eye(space.size, dtype=torch.float64)
    assert (matrix.mT @ matrix - neutral).abs().max() <= 16 * space.size * EPSILON


def test_condition_two_does_not() -> None:
    """The control of the test above, for the kinds that hold more than isometries."""
    scaling = {"general_linear", "rotary", "pair_scale", "block_scale", "positive_diagonal", "diagonal"}
    for kind in KINDS:
        matrix = sample(space(kind), Stream.from_seed(0), 2.0).matrix()
        is_isometry = torch.allclose(matrix.mT @ matrix, torch.eye(8, dtype=torch.float64))
        assert is_isometry == (kind not in scaling), kind


def test_samples_come_close_to_the_condition_asked_for() -> None:
    """Otherwise the bound would hold for the identity too. Among 200 blocks one has numbers near both ends."""
    for kind in ("general_linear", "rotary", "pair_scale", "positive_diagonal", "diagonal"):
        element = sample(space(kind, blocks=200), Stream.from_seed(0), 16.0)
        assert element.condition() > 16**0.9, kind


SIGNED = {"signed_permutation", "orthogonal"}

# Subgroups: each kind with every kind that contains it. A quarter turn moves coordinates and flips signs; nothing else
# that moves coordinates is a matrix of complex numbers.
CONTAINED_IN: dict[GroupKind, set[str]] = {
    "general_linear": {"general_linear"},
    "rotary": {"rotary", "general_linear"},
    "quarter_turn": {"quarter_turn", "rotary", "general_linear", *SIGNED},
    "pair_sign": {"pair_sign", "quarter_turn", "rotary", "diagonal", "general_linear", *SIGNED},
    "pair_scale": {"pair_scale", "rotary", "positive_diagonal", "diagonal", "general_linear"},
    "block_scale": {"block_scale", "pair_scale", "rotary", "positive_diagonal", "diagonal", "general_linear"},
    "block_sign": {
        "block_sign", "pair_sign", "quarter_turn", "rotary", "diagonal", "general_linear", "common_sign_permutation",
        "centred_orthogonal", *SIGNED,
    },
    "permutation": {"permutation", "general_linear", "common_sign_permutation", "centred_orthogonal", *SIGNED},
    "positive_diagonal": {"positive_diagonal", "diagonal", "general_linear"},
    "diagonal": {"diagonal", "general_linear"},
    "signed_permutation": {"general_linear", *SIGNED},
    "common_sign_permutation": {"common_sign_permutation", "centred_orthogonal", "general_linear", *SIGNED},
    "orthogonal": {"orthogonal", "general_linear"},
    "centred_orthogonal": {"centred_orthogonal", "orthogonal", "general_linear"},
}  # fmt: skip


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_belongs_to_exactly_the_groups_that_contain_its_own(kind: GroupKind, pairing: Pairing) -> None:
    blocks = 20  # enough for a sign of each kind
    element = sample(space(kind, blocks, pairing=pairing), Stream.from_seed(1), 4.0)
    found = {other for other in KINDS if contains(space(other, blocks, pairing=pairing), element)}
    assert found == CONTAINED_IN[kind]


@pytest.mark.parametrize("kind", PAIRED)
def test_the_other_pairing_is_another_group(kind: GroupKind) -> None:
    element = sample(space(kind, pairing="half"), Stream.from_seed(1), 4.0)
    assert not contains(space(kind, pairing="interleaved"), element)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbed_sample_is_rejected(kind: GroupKind) -> None:
    where = space(kind)
    matrix = sample(where, Stream.from_seed(2), 4.0).matrix()
    assert contains(where, Dense(matrix))
    noise = torch.from_numpy(Stream.from_seed(3).normal(3, 8, 8))
    if kind != "general_linear":
        assert not contains(where, Dense(matrix + 1e-6 * noise))
        one_entry = matrix.clone()
        one_entry[1, 0, 1] += 1e-6
        assert not contains(where, Dense(one_entry))
    assert contains(where, Dense(matrix + 1e-12 * noise))
    for bad in (math.nan, math.inf, -math.inf):
        broken = matrix.clone()
        broken[2, 3, 4] = bad
        assert not contains(where, Dense(broken))
    assert not contains(where, Dense(torch.zeros_like(matrix)))
    for shape in ((2, 8, 8), (3, 6, 6), (1, 3, 8)):
        assert not contains(where, Dense(torch.ones(shape, dtype=torch.float64)))


def test_singular_matrices_are_not_invertible() -> None:
    matrix = sample(space("general_linear"), Stream.from_seed(2), 4.0).matrix()
    matrix[1, :, 0] = matrix[1, :, 1]
    assert not contains(space("general_linear"), Dense(matrix))
    for kind in ("diagonal", "positive_diagonal"):
        scale = torch.ones(3, 8, dtype=torch.float64)
        scale[0, 0] = 0
        assert not contains(space(kind), Monomial(torch.arange(8).expand(3, -1), scale))
    assert not contains(space("rotary"), Rotary(torch.zeros(3, 4, dtype=torch.complex128), "half"))


def test_two_to_one_is_no_permutation() -> None:
    matrix = torch.eye(8, dtype=torch.float64).repeat(3, 1, 1)
    matrix[0, 0, 0], matrix[0, 0, 1] = 0, 1  # rows stay one-hot, column 1 is taken twice
    assert not contains(space("permutation"), Dense(matrix))


def test_turns_take_all_four_values_on_both_axes() -> None:
    element = sample(space("quarter_turn", blocks=100), Stream.from_seed(0), 4.0)
    matrix = element.matrix()
    turns = torch.complex(matrix[:, 0, 0], matrix[:, 4, 0]).flatten()
    assert {complex(turn) for turn in turns.tolist()} == {1, 1j, -1, -1j}
    assert torch.equal(torch.linalg.det(matrix).round(), torch.ones(100, dtype=torch.float64))


def test_other_turns_and_lengths_are_no_quarter_turns() -> None:
    where = space("quarter_turn", blocks=1, size=2)
    for value in (1j, -1, 1 + 0j):
        assert contains(where, Rotary(torch.tensor([[value]], dtype=torch.complex128), "half"))
    for value in (cmath.exp(0.25j * math.pi), cmath.exp(1j), 2j, 1.001):
        assert not contains(where, Rotary(torch.tensor([[value]], dtype=torch.complex128), "half"))


def hoeffding(count: int, spread: float) -> float:
    """How far the mean of ``count`` independent numbers within an interval of length ``spread`` may lie off."""
    return spread * math.sqrt(math.log(2 / CHANCE) / (2 * count))


MATRICES, DIMENSION = 4000, 3


def haar_deviations(rotations: Tensor) -> tuple[float, float, float]:
    """Of mean, mean square and handedness from those of the Haar measure, each in units of its bound."""
    bound = hoeffding(len(rotations), 2.0)
    mean = float(rotations.mean(0).abs().max()) / bound
    square = float(((rotations**2).mean(0) - 1 / DIMENSION).abs().max()) / hoeffding(len(rotations), 1.0)
    handed = abs(float(torch.linalg.det(rotations).sign().mean())) / bound
    return mean, square, handed


def test_rotations_follow_the_haar_measure() -> None:
    rotations = haar(MATRICES, DIMENSION, Stream.from_seed(0))
    neutral = torch.eye(DIMENSION, dtype=torch.float64)
    assert (rotations.mT @ rotations - neutral).abs().max() <= 16 * DIMENSION * EPSILON
    assert max(haar_deviations(rotations)) <= 1
    # Invariance: after a fixed rotation they are spread as before.
    assert max(haar_deviations(haar(1, DIMENSION, Stream.from_seed(9)) @ rotations)) <= 1


def test_without_the_signs_they_would_not() -> None:
    """The control: the factor Q of a Gaussian matrix as LAPACK returns it prefers one side."""
    rotations, _ = torch.linalg.qr(torch.from_numpy(Stream.from_seed(0).normal(MATRICES, DIMENSION, DIMENSION)))
    assert max(haar_deviations(rotations)) > 1


@pytest.mark.parametrize("condition", [1.0, 4.0, 1000.0])
def test_scales_are_log_uniform(condition: float) -> None:
    numbers = log_uniform((10_000,), condition, Stream.from_seed(0)).numpy()
    edge = math.sqrt(condition)
    slack = 4 * EPSILON  # of the exponential
    assert (1 - slack) / edge <= numbers.min() <= numbers.max() <= edge * (1 + slack)
    if condition > 1:
        uniform = np.sort(np.log(numbers) / math.log(condition) + 0.5)
        steps = (np.arange(10_000) + 0.5) / 10_000
        kolmogorov = math.sqrt(math.log(2 / CHANCE) / (2 * 10_000))
        assert np.abs(uniform - steps).max() <= kolmogorov + 0.5 / 10_000
        linear = np.sort((numbers - 1 / edge) / (edge - 1 / edge))  # the control: not uniform itself
        assert np.abs(linear - steps).max() > kolmogorov + 0.5 / 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_is_repeatable_and_follows_the_stream(kind: GroupKind) -> None:
    first, again, other = (sample(space(kind), Stream.from_seed(seed), 4.0).matrix() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    blocks = [tuple(block.flatten().tolist()) for block in sample(space(kind, 20), Stream.from_seed(0), 4.0).matrix()]
    assert len(set(blocks)) > 1  # every head has its own


def test_a_condition_below_one_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        sample(space("rotary"), Stream.from_seed(0), 0.5)
