"""A gauge: one group element per space. Protecting samples one, restoring inverts it, attacking estimates it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from unmergeable.architecture.symmetry import Space
from unmergeable.gauge.elements import Element
from unmergeable.gauge.groups import sample
from unmergeable.randomness import Stream


@dataclass(frozen=True)
class Gauge:
    """Elements by space name, made when asked for: a 400 GB model's gauge never sits in memory as a whole.

    ``is_inverse`` reverses the order in which the legs of a tensor act: undoing a basis change inside the
    heads followed by a reordering of heads starts with the reordering.
    """

    spaces: Mapping[str, Space]
    element_of: Callable[[str], Element]
    is_inverse: bool = False

    def __contains__(self, space: object) -> bool:
        return space in self.spaces

    def __iter__(self) -> Iterator[str]:
        return iter(self.spaces)

    def __getitem__(self, space: str) -> Element:
        element = self.element_of(space)
        return element.inverse() if self.is_inverse else element

    def inverse(self) -> Gauge:
        return Gauge(self.spaces, self.element_of, not self.is_inverse)

    def condition(self) -> float:
        """The largest condition number of any element (1 when there is none)."""
        return max((self[name].condition() for name in self), default=1.0)


def undo(gauges: Sequence[Gauge]) -> tuple[Gauge, ...]:
    """The gauges that undo ``gauges`` applied left to right."""
    return tuple(gauge.inverse() for gauge in reversed(gauges))


def sampled_gauge(spaces: Mapping[str, Space], stream: Stream, condition: float) -> Gauge:
    """A random element of every space; the same stream gives the same gauge, whatever the order of asking."""
    return Gauge(spaces, lambda name: sample(spaces[name], stream.child(name), condition))


def fixed_gauge(spaces: Mapping[str, Space], elements: Mapping[str, Element]) -> Gauge:
    """The gauge made of ``elements``; spaces without one are left out."""
    return Gauge({name: spaces[name] for name in elements}, elements.__getitem__)
