"""What is accepted: a group whose random elements leave the function alone while what is outside it does not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmergeable.architecture.symmetry import Group, Space, SymmetryMap
from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.derivation.build import Specimen
from unmergeable.derivation.probe import Disk
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import fixed_gauge
from unmergeable.gauge.groups import identity, sample
from unmergeable.network.disk_weights import show
from unmergeable.randomness import Stream

TOLERANCE = 1e-9
"""Largest relative change of any output that counts as none, in float64."""

VISIBLE = 1e-6
"""Least relative change by which a control shows that the outputs depend on what was changed."""

CONDITION = 4.0


@dataclass(frozen=True)
class Proof:
    """``change``: the largest relative change of outputs under the group. ``one_sided``: under its elements on all but
    one tensor. ``outside``: under an element of a larger group; None where there is no larger one to try.
    """

    change: float
    one_sided: float
    outside: float | None

    @property
    def holds(self) -> bool:
        return (
            self.change <= TOLERANCE and self.one_sided >= VISIBLE and (self.outside is None or self.outside >= VISIBLE)
        )

    def __str__(self) -> str:
        if self.change > TOLERANCE:
            return f"changes the function by {self.change:.1e}"
        outside = "" if self.outside is None else f", by {self.outside:.1e} with an element from outside"
        return f"the function changes by {self.one_sided:.1e} with one side left alone{outside}"


class Prover:
    """A small network whose weights may be changed and put back."""

    def __init__(self, specimen: Specimen, disk: Disk) -> None:
        self._specimen = specimen
        self._disk = disk
        state = {name: tensor.detach() for name, tensor in specimen.network.state_dict().items()}
        stored = to_disk_names(specimen.network, state)
        self.weights: dict[str, Tensor] = {name: tensor.clone() for name, tensor in stored.items()}
        with torch.no_grad():
            self._expected = specimen.outputs()

    def change(self, symmetry: SymmetryMap, elements: Mapping[str, Element]) -> float:
        """The largest change of any output under ``elements``, relative to the largest output."""
        names = symmetry.tensors_of(elements)
        before = {name: self.weights[name] for name in names}
        after = transform_all(before, symmetry, [fixed_gauge(symmetry.spaces, elements)])
        try:
            show(self._disk.places, after)
            with torch.no_grad():
                found = self._specimen.outputs()
        finally:
            show(self._disk.places, {name: tensor.clone() for name, tensor in before.items()})
        if not bool((torch.isfinite(found) == torch.isfinite(self._expected)).all()):
            return float("inf")
        real = torch.isfinite(self._expected)
        return float((found - self._expected)[real].abs().max() / self._expected[real].abs().max())

    def together(self, symmetry: SymmetryMap, spaces: Mapping[str, Space]) -> float:
        """The change under a random element of every space at once."""
        stream = Stream.from_seed(1)
        return self.change(symmetry, {name: sample(s, stream.child(name), CONDITION) for name, s in spaces.items()})

    def prove(self, symmetry: SymmetryMap, space: Space) -> Proof:
        """Try a space's group: two random elements, the same on all sides but one, and one from outside the group."""
        stream = Stream.from_seed(0).child(space.name)
        elements = _moving(space, stream)
        change = max(self.change(symmetry, {space.name: element}) for element in elements)
        if change > TOLERANCE:
            return Proof(change, 0.0, None)
        one_sided = self._one_sided(symmetry, space, elements[0])
        larger = _outside(space, stream.child("outside"))
        outside = None if larger is None else self.change(_enlarged(symmetry, space), {space.name: larger})
        return Proof(change, one_sided, outside)

    def _one_sided(self, symmetry: SymmetryMap, space: Space, element: Element) -> float:
        """The change when the last weight of the space does not follow; where nothing shows that, another one.

        A softmax does not see what a bias adds to every key.
        """
        owners = [name for name, legs in symmetry.legs.items() if any(leg.space == space.name for leg in legs)]
        matrices = [name for name in owners if self.weights[name].dim() > 1] or owners
        largest = 0.0
        for left in reversed(matrices):
            legs = list(symmetry.legs[left])
            place = max(index for index, leg in enumerate(legs) if leg.space == space.name)
            del legs[place]
            changed = replace(symmetry, legs={**symmetry.legs, left: tuple(legs)})
            largest = max(largest, self.change(changed, {space.name: element}))
            if largest >= VISIBLE:
                break
        return largest


def _moving(space: Space, stream: Stream, count: int = 2) -> list[Element]:
    """Random elements of a space's group other than the neutral one, which small groups draw often."""
    drawn = (sample(space, stream.child(str(trial)), CONDITION) for trial in itertools.count())
    neutral = identity(space).matrix()
    moving = (element for element in drawn if not torch.allclose(element.matrix(), neutral))
    return list(itertools.islice(moving, count))


def _outside(space: Space, stream: Stream) -> Element | None:
    """An element of a larger group, in which the space's own is contained; None where that is the largest."""
    kind = space.group.kind
    if kind == "general_linear" or space.size <= 2:
        return None
    if kind in {"rotary", "diagonal", "positive_diagonal"}:
        return sample(replace(space, group=Group("general_linear")), stream, CONDITION)
    order = torch.arange(space.size).expand(space.blocks, -1).clone()
    return Monomial(order, torch.linspace(0.6, 1.7, space.size, dtype=torch.float64).expand(space.blocks, -1).clone())


def _enlarged(symmetry: SymmetryMap, space: Space) -> SymmetryMap:
    """The map as if any matrix were in the space's group; norm gains, which follow no scale, do not follow it."""
    legs = {
        name: tuple(leg for leg in every if leg.space != space.name or leg.variance != "gain")
        for name, every in symmetry.legs.items()
    }
    spaces = {**symmetry.spaces, space.name: replace(space, group=Group("general_linear"))}
    return replace(symmetry, spaces=spaces, legs=legs)
