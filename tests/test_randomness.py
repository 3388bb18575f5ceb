"""Labelled streams: the same numbers for the same key and label everywhere, and numbers that look like chance."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.randomness import KEY_BYTES, Floats, Stream, new_entropy

LABEL = "layers.0.query_key"
DRAWS = 20_000
# Every statistical bound below is exceeded by chance with at most this probability, and the seeds are fixed anyway.
CHANCE = 1e-9
laws = settings(max_examples=50, deadline=None, derandomize=True)


def golden_stream() -> Stream:
    return Stream.from_seed(0).child(LABEL)


def test_the_numbers_of_a_seed_are_frozen() -> None:
    """A key file holds 32 bytes and a recipe: were these numbers to change, no key in the world would fit any more."""
    stream = golden_stream()
    assert stream.key.hex() == "9ba3c7cec305a9456ed3ab4dc02aa8d0f3663a2f66bbf97223bc105547597b43"
    assert stream.uniform(3).tolist() == [0.7716617362602235, 0.0006135119670677147, 0.3505448811239086]
    assert stream.signs(8).tolist() == [1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    assert stream.permutations(2, 5).tolist() == [[1, 3, 2, 0, 4], [3, 4, 0, 2, 1]]
    # Logarithm, cosine and square root are each good to an ulp or so, and differ in the last place between processors.
    np.testing.assert_allclose(
        stream.normal(3), [-0.4252044856176699, 3.810901252240346, 0.5810500204822938], rtol=8 * np.finfo(float).eps
    )
    secret = Stream.from_entropy(bytes(range(KEY_BYTES)))
    assert secret.uniform(2).tolist() == [0.3818453526774491, 0.5665901783237742]
    assert secret.child("x").uniform(1).tolist() == [0.2812800537699939]


def test_a_stream_is_what_its_docstring_says() -> None:
    """The construction once more, in integers: BLAKE2b for keys, SHAKE-256 for words, odd multiples of 2^-53."""
    seed_key = hashlib.blake2b(b"0", digest_size=32, person=b"unmergeable-seed").digest()
    key = hashlib.blake2b(LABEL.encode(), key=seed_key, digest_size=32).digest()
    digest = hashlib.shake_256(key).digest(8 * 100)
    words = [int.from_bytes(digest[start : start + 8], "little") for start in range(0, 800, 8)]
    expected = [Fraction(2 * (word >> 12) + 1, 2**53) for word in words]
    assert [Fraction(number) for number in golden_stream().uniform(100).tolist()] == expected
    order = sorted(range(100), key=lambda position: words[position])
    assert golden_stream().permutations(1, 100)[0].tolist() == order


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_uniform_never_reaches_zero_or_one(byte: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    extreme = np.frombuffer(byte * 8, dtype="<u8")
    monkeypatch.setattr(Stream, "_words", lambda self, count: np.repeat(extreme, count))
    (number,) = Stream.from_seed(0).uniform(1)
    assert 0 < number < 1
    assert np.isfinite(Stream.from_seed(0).normal(5)).all()
    # The control: with one bit more per number the largest word gives 1.
    naive = ((extreme >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    assert bool(naive[0] == 1) == (byte == b"\xff")


def test_asking_in_any_order_from_any_thread_gives_the_same() -> None:
    root = Stream.from_seed(3)
    labels = [f"layers.{index}" for index in range(50)]
    forwards = {label: root.child(label).normal(7, 3) for label in labels}
    with ThreadPoolExecutor(4) as pool:
        threaded = dict(
            zip(reversed(labels), pool.map(lambda label: root.child(label).normal(7, 3), reversed(labels)), strict=True)
        )
    assert all(np.array_equal(forwards[label], threaded[label]) for label in labels)


def test_another_process_gives_the_same() -> None:
    program = (
        "from unmergeable.randomness import Stream\n"
        f"s = Stream.from_seed(0).child({LABEL!r})\n"
        "print(s.uniform(3).tolist() + s.permutations(2, 5).tolist())"
    )
    # A Python whose str hashes differ: nothing may depend on them.
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    stream = golden_stream()
    assert ran.stdout.strip() == str(stream.uniform(3).tolist() + stream.permutations(2, 5).tolist())


def test_labels_do_not_run_into_each_other() -> None:
    root = Stream.from_seed(0)
    streams = [
        root,
        root.child(""),
        root.child("ab"),
        root.child("a").child("b"),
        root.child("b").child("a"),
        root.child("a"),
        root.child("a\0b"),
        Stream.from_seed(1),
        Stream.from_seed(-1),
        Stream.from_seed(2**200),
        Stream.from_entropy(b"0" * KEY_BYTES),
        Stream.from_entropy(root.key),
    ]
    assert len({stream.key for stream in streams}) == len(streams)
    assert len({tuple(stream.uniform(4)) for stream in streams}) == len(streams)


@pytest.mark.parametrize(
    ("one", "other"), [("layers.0", "layers.1"), ("a", "b"), ("", "\0"), ("layers.1", "layers.11")]
)
def test_labels_give_uncorrelated_numbers(one: str, other: str) -> None:
    root = Stream.from_seed(0)
    first, second = root.child(one).uniform(DRAWS), root.child(other).uniform(DRAWS)
    assert abs(correlation(first, second)) <= CORRELATION_BOUND
    # Neighbours share a number with the next pair; every other pair does not.
    assert abs(correlation(first[1::2], first[::2])) <= CORRELATION_BOUND * math.sqrt(2)
    # The control: numbers that share a tenth of their variance are told apart.
    assert abs(correlation(first, second + first / 3)) > CORRELATION_BOUND


# Hoeffding for the mean of products of two independent centred uniforms, each in [-1/4, 1/4], over their variance 1/12.
CORRELATION_BOUND = 12 * 0.5 * math.sqrt(math.log(2 / CHANCE) / (2 * DRAWS))


def correlation(first: Floats, second: Floats) -> float:
    """Of numbers uniform on (0, 1), whose variance is 1/12."""
    return float(12 * np.mean((first - 0.5) * (second - 0.5)))


# Dvoretzky-Kiefer-Wolfowitz: P(sup |F_n - F| > t) <= 2 exp(-2 n t^2).
KOLMOGOROV_BOUND = math.sqrt(math.log(2 / CHANCE) / (2 * DRAWS))


def distance_from_uniform(numbers: Floats) -> float:
    """The Kolmogorov-Smirnov distance of numbers from the uniform distribution on (0, 1)."""
    ordered = np.sort(numbers)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max(np.abs(ordered - steps[1:]).max(), np.abs(ordered - steps[:-1]).max()))


def normal_cdf(numbers: Floats) -> Floats:
    return np.array([0.5 * math.erfc(-number / math.sqrt(2)) for number in numbers])


@pytest.mark.parametrize("seed", range(3))
def test_uniform_is_uniform_and_normal_is_normal(seed: int) -> None:
    stream = Stream.from_seed(seed)
    assert distance_from_uniform(stream.child("u").uniform(DRAWS)) <= KOLMOGOROV_BOUND
    normal = stream.child("n").normal(DRAWS)
    assert distance_from_uniform(normal_cdf(normal)) <= KOLMOGOROV_BOUND
    # Box-Muller makes pairs from one radius: their halves must be as independent as the rest.
    halves = normal_cdf(normal[: DRAWS // 2]), normal_cdf(normal[DRAWS // 2 :])
    assert abs(correlation(*halves)) <= CORRELATION_BOUND * math.sqrt(2)
    radius = 1 - np.exp(-(normal[: DRAWS // 2] ** 2 + normal[DRAWS // 2 :] ** 2) / 2)
    assert distance_from_uniform(radius) <= KOLMOGOROV_BOUND * math.sqrt(2)


def test_the_uniformity_bound_can_fail() -> None:
    numbers = Stream.from_seed(0).uniform(DRAWS)
    assert distance_from_uniform(numbers**1.2) > KOLMOGOROV_BOUND
    assert distance_from_uniform(normal_cdf(1.1 * Stream.from_seed(0).normal(DRAWS))) > KOLMOGOROV_BOUND


def test_signs_are_fair() -> None:
    signs = Stream.from_seed(4).signs(DRAWS)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) <= math.sqrt(2 * math.log(2 / CHANCE) / DRAWS)  # Hoeffding


PLACES = 5
PAIR_BOUND = math.sqrt(math.log(2 * PLACES**4 / CHANCE) / (2 * DRAWS))  # Hoeffding over all places and values


def distance_from_uniform_orders(orders: npt.NDArray[np.int64]) -> float:
    """How far any two places are from holding every two different values equally often."""
    worst = 0.0
    for one, other in itertools.permutations(range(PLACES), 2):
        counts = np.zeros((PLACES, PLACES))
        np.add.at(counts, (orders[:, one], orders[:, other]), 1)
        expected = (1 - np.eye(PLACES)) / (PLACES * (PLACES - 1))
        worst = max(worst, float(np.abs(counts / len(orders) - expected).max()))
    return worst


def test_every_order_is_equally_likely() -> None:
    orders = Stream.from_seed(5).permutations(DRAWS, PLACES)
    assert distance_from_uniform_orders(orders) <= PAIR_BOUND
    # The control: with random shifts every value is equally likely at every place, but places know of each other.
    shifts = (np.arange(PLACES) + orders[:, :1]) % PLACES
    assert distance_from_uniform_orders(shifts) > PAIR_BOUND


@laws
@given(blocks=st.integers(0, 4), size=st.integers(0, 40), seed=st.integers())
def test_permutations_are_permutations(blocks: int, size: int, seed: int) -> None:
    orders = Stream.from_seed(seed).permutations(blocks, size)
    assert orders.shape == (blocks, size)
    assert orders.dtype == np.int64
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(size), (blocks, 1)))


@laws
@given(shape=st.lists(st.integers(0, 5), max_size=3), seed=st.integers())
def test_every_shape_can_be_drawn(shape: list[int], seed: int) -> None:
    stream = Stream.from_seed(seed)
    draws: tuple[Callable[..., Floats], ...] = (stream.uniform, stream.normal, stream.signs)
    for draw in draws:
        numbers = draw(*shape)
        assert numbers.shape == tuple(shape)
        assert numbers.dtype == np.float64
        assert np.isfinite(numbers).all()


def test_a_stream_does_not_show_its_key() -> None:
    stream = Stream.from_entropy(bytes(range(KEY_BYTES)))
    for text in (repr(stream), str(stream), f"{stream}"):
        assert stream.key.hex() not in text
        assert repr(stream.key) not in text


def test_entropy_is_new_every_time() -> None:
    drawn = {new_entropy() for _ in range(100)}
    assert len(drawn) == 100
    assert {len(entropy) for entropy in drawn} == {KEY_BYTES}
    with pytest.raises(AssertionError):
        Stream.from_entropy(b"short")
