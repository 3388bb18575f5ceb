"""Gauges: elements by name, made when asked for, the same whatever the order of asking."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from unmergeable.architecture.symmetry import Group, Space
from unmergeable.gauge.elements import Element
from unmergeable.gauge.gauge import Gauge, fixed_gauge, sampled_gauge, undo
from unmergeable.gauge.groups import contains, identity, sample
from unmergeable.randomness import Stream

SPACES = {
    "a": Space("a", "query_key", Group("general_linear"), 2, 4),
    "b": Space("b", "value_output", Group("general_linear"), 2, 4),
    "c": Space("c", "query_key", Group("rotary", "half"), 3, 6),
    "d": Space("d", "heads", Group("permutation"), 1, 5),
}


def drawn(seed: int = 0, condition: float = 4.0) -> Gauge:
    return sampled_gauge(SPACES, Stream.from_seed(seed), condition)


def test_a_sampled_gauge_has_an_element_of_every_space() -> None:
    gauge = drawn()
    assert list(gauge) == list(SPACES)
    assert all(name in gauge for name in SPACES)
    assert "e" not in gauge
    for name, space in SPACES.items():
        assert contains(space, gauge[name])


def test_the_order_of_asking_does_not_matter() -> None:
    gauge = drawn()
    forwards = {name: gauge[name].matrix() for name in SPACES}
    for name in reversed(SPACES):
        assert torch.equal(gauge[name].matrix(), forwards[name])
    subset = sampled_gauge({"c": SPACES["c"]}, Stream.from_seed(0), 4.0)
    assert torch.equal(subset["c"].matrix(), forwards["c"])
    with ThreadPoolExecutor(4) as pool:
        names = list(SPACES) * 5
        for name, matrix in zip(names, pool.map(lambda name: gauge[name].matrix(), names), strict=True):
            assert torch.equal(matrix, forwards[name])


def test_spaces_and_seeds_are_independent() -> None:
    gauge = drawn()
    assert not torch.equal(gauge["a"].matrix(), gauge["b"].matrix())  # alike but for the name
    assert not torch.equal(gauge["a"].matrix(), drawn(seed=1)["a"].matrix())


def test_elements_are_made_when_asked_for_and_not_kept() -> None:
    made: list[str] = []

    def make(name: str) -> Element:
        made.append(name)
        return identity(SPACES[name])

    gauge = Gauge(SPACES, make)
    assert list(gauge.inverse().inverse()) == list(SPACES)
    assert undo([gauge, gauge])
    assert made == []
    first = gauge["b"]
    assert gauge["b"] is not first
    assert made == ["b", "b"]


def test_the_inverse_undoes_every_element() -> None:
    gauge = drawn()
    inverse = gauge.inverse()
    assert inverse.is_inverse
    assert not gauge.is_inverse
    assert not inverse.inverse().is_inverse
    for name, space in SPACES.items():
        product = inverse[name].matrix() @ gauge[name].matrix()
        neutral = identity(space).matrix()
        assert (product - neutral).abs().max() <= 64 * torch.finfo(torch.float64).eps * 4.0
        assert not torch.allclose(gauge[name].matrix(), neutral, atol=1e-3)  # else the line above says nothing
        assert torch.equal(inverse.inverse()[name].matrix(), gauge[name].matrix())


def test_condition_is_the_largest_of_any_element() -> None:
    gauge = drawn()
    largest = max(gauge[name].condition() for name in SPACES)
    assert gauge.condition() == largest
    assert 1 < largest <= 4.0 * (1 + 1e-12)
    assert gauge.inverse().condition() == pytest.approx(largest)
    assert fixed_gauge(SPACES, {}).condition() == 1.0
    assert drawn(condition=1.0).condition() == pytest.approx(1.0)


def test_undoing_goes_backwards() -> None:
    first, second, third = drawn(1), drawn(2).inverse(), drawn(3)
    undone = undo([first, second, third])
    assert [gauge.is_inverse for gauge in undone] == [True, False, True]
    for found, expected in zip(undone, (third, second.inverse(), first), strict=True):
        assert found.element_of is expected.element_of
    assert undo([]) == ()


def test_a_fixed_gauge_has_the_elements_it_is_given() -> None:
    element = sample(SPACES["c"], Stream.from_seed(0), 4.0)
    gauge = fixed_gauge(SPACES, {"c": element})
    assert list(gauge) == ["c"]
    assert "a" not in gauge
    assert gauge["c"] is element
    assert gauge.spaces["c"] is SPACES["c"]
    with pytest.raises(KeyError):
        gauge["a"]
    with pytest.raises(KeyError):
        fixed_gauge(SPACES, {"unknown": element})
