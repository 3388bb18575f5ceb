"""Gathers spaces and legs while the rules walk what a family declares."""

from __future__ import annotations

from collections.abc import Iterable

from unmergeable.architecture.symmetry import Group, GroupKind, Leg, Pairing, Role, Space, Stack, SymmetryMap, Variance


class Collector:
    """Spaces and legs as the rules find them."""

    def __init__(self) -> None:
        self.spaces: dict[str, Space] = {}
        self.inner: dict[str, list[Leg]] = {}
        self.outer: dict[str, list[Leg]] = {}
        self.gain_offset: dict[str, float] = {}
        self.stacks: list[Stack] = []
        self.missing: dict[str, str] = {}

    def space(
        self,
        name: str,
        role: Role,
        kind: GroupKind,
        *,
        blocks: int,
        size: int,
        pairing: Pairing | None = None,
        limit: str = "",
        is_cross: bool = False,
        epsilon: float = 0.0,
        folded: tuple[str, ...] = (),
    ) -> Space:
        space = Space(name, role, Group(kind, pairing), blocks, size, limit, is_cross, epsilon, folded)
        self.spaces[name] = space
        return space

    def leg(
        self,
        space: Space,
        tensor: str | None,
        variance: Variance,
        *,
        axis: int = 0,
        offset: int = 0,
        block_stride: int = 0,
        element_stride: int = 1,
        spectators: Iterable[tuple[int, int]] = (),
        in_slice: int | None = None,
        is_outer: bool = False,
    ) -> None:
        if tensor is None:
            return
        kept = tuple((count, stride) for count, stride in spectators if count > 1)
        leg = Leg(space.name, axis, variance, offset, block_stride, element_stride, kept, in_slice)
        (self.outer if is_outer else self.inner).setdefault(tensor, []).append(leg)

    def finish(self) -> SymmetryMap:
        order = dict.fromkeys([*self.inner, *self.outer])
        legs = {name: tuple(self.inner.get(name, []) + self.outer.get(name, [])) for name in order}
        return SymmetryMap(self.spaces, legs, self.gain_offset, tuple(self.stacks), self.missing)
