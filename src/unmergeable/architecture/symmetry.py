"""What may be done to which tensor axis without changing the network: symmetries as data.

A *space* is a basis that only the weights can see: the coordinates of a head's keys, of its values, of a
feed-forward's hidden units. Changing that basis on everything that writes into the space, and undoing it on
everything that reads from it, leaves the function alone. A *leg* says that one axis of one tensor lives in
one space, where its coordinates lie on the axis, and how they transform:

    vector      x' = M x          rows of a writer (W_q, W_v, their biases)
    covector    x' = M^-T x       columns of a reader, or the other factor of a product (W_k, W_o)
    gain        x' = |M| x        an elementwise gain between the two, for signed permutations M

Where whole tensors are the coordinates (one for each expert behind a router) a *stack* lists them in order; its legs
lie on the axis along which they would be stacked.

Nothing here touches numbers; :mod:`unmergeable.gauge` does, with these tables in hand.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Pairing = Literal["half", "interleaved"]
"""How rotary position embeddings pair coordinates: (i, i + d/2), or (2i, 2i + 1)."""

Variance = Literal["vector", "covector", "gain"]

GroupKind = Literal[
    "general_linear",  # any invertible matrix
    "rotary",  # one nonzero complex number per frequency pair
    "quarter_turn",  # a multiple of 90 degrees per frequency pair
    "pair_sign",  # +1 or -1 per frequency pair
    "pair_scale",  # one positive number per frequency pair
    "block_scale",  # one positive number for the whole block
    "block_sign",  # +1 or -1 for the whole block
    "permutation",
    "positive_diagonal",
    "diagonal",  # nonzero entries, signs allowed
    "signed_permutation",  # a permutation, and a sign of its own for every coordinate
    "common_sign_permutation",  # a permutation, and one sign for all coordinates
    "orthogonal",
    "centred_orthogonal",  # those that take the vector of ones to itself, or to its negative
]

ROTATIONS: frozenset[GroupKind] = frozenset({"orthogonal", "centred_orthogonal"})
"""Groups that act on a stream only while the gains of its norms are folded away."""

Role = Literal["query_key", "value_output", "heads", "feed_forward", "experts", "norm", "residual"]


@dataclass(frozen=True)
class Group:
    """A matrix group acting on one block; ``pairing`` only for the kinds that speak of frequency pairs."""

    kind: GroupKind
    pairing: Pairing | None = None

    def __post_init__(self) -> None:
        needs_pairing = self.kind in {"rotary", "quarter_turn", "pair_sign", "pair_scale"}
        assert needs_pairing == (self.pairing is not None)

    def __str__(self) -> str:
        return f"{self.kind}({self.pairing})" if self.pairing else self.kind


@dataclass(frozen=True)
class Space:
    """A basis only the weights see: ``blocks`` independent copies of ``group`` acting on ``size`` coordinates.

    ``limit`` says in words why the group is no larger, empty when it is all of GL. ``is_cross`` marks
    cross-attention. ``epsilon`` is that of a norm which must be negligible beside what it normalises for the
    group to keep the function: 0 where the symmetry is exact as it stands. ``folded`` names the spaces of norm gains
    that have to be one while the group acts: each gain is moved into the weights that read it, and may be moved back
    afterwards; empty where nothing has to move.
    """

    name: str
    role: Role
    group: Group
    blocks: int
    size: int
    limit: str = ""
    is_cross: bool = False
    epsilon: float = 0.0
    folded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leg:
    """One axis of one tensor lives in one space.

    Coordinate ``i`` of block ``b`` lies at ``offset + b * block_stride + i * element_stride`` on the axis, and
    again at every combination of the ``spectators`` (count, stride): query heads that share a key head,
    coordinates that travel with a permuted head. ``slice``: only in this slice of the tensor along its first axis, as
    one expert lies in a tensor that holds all of them; ``axis`` is then one of the others.
    """

    space: str
    axis: int
    variance: Variance
    offset: int
    block_stride: int
    element_stride: int = 1
    spectators: tuple[tuple[int, int], ...] = ()
    slice: int | None = None

    def extent(self, space: Space) -> int:
        """The smallest axis length that holds every coordinate of this leg."""
        last = self.offset + (space.blocks - 1) * self.block_stride + (space.size - 1) * self.element_stride
        return last + sum((count - 1) * stride for count, stride in self.spectators) + 1


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape that stand for the slices of a larger one: ``members[i]`` is its slice ``i``.

    A reordering of the slices is a reordering of the names. ``legs`` lie on the axis that is not stored.
    """

    members: tuple[str, ...]
    legs: tuple[Leg, ...]


@dataclass(frozen=True)
class SymmetryMap:
    """Every space of a network, and the legs of every tensor that has one.

    Legs of one tensor are listed inner first: a change of basis inside a head comes before the permutation
    of heads, and both before a tensor takes another place in its stack. ``gain_offset`` holds tensors stored as ``w``
    where the network uses ``offset + w``. ``missing`` says for a space that one might look for why it is not there.
    """

    spaces: Mapping[str, Space]
    legs: Mapping[str, tuple[Leg, ...]]
    gain_offset: Mapping[str, float] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def stack_of(self) -> Mapping[str, Stack]:
        """The stack of every tensor that is in one."""
        return {member: stack for stack in self.stacks for member in stack.members}

    def select(
        self, *roles: Role, cross_attention: bool = True, negligible_epsilon: bool = False, folding: bool = False
    ) -> dict[str, Space]:
        """The spaces of the given roles, in the order of the network.

        ``negligible_epsilon`` adds those that are exact only when a norm's epsilon is, ``folding`` those that are
        exact only while norm gains are folded away.
        """
        return {
            name: space
            for name, space in self.spaces.items()
            if space.role in roles
            and (cross_attention or not space.is_cross)
            and (negligible_epsilon or space.epsilon == 0)
            and (folding or not space.folded)
        }

    def tensors_of(self, spaces: Container[str]) -> list[str]:
        """Names of the tensors that a change of basis in any of ``spaces`` alters."""
        reordered = (stack for stack in self.stacks if any(leg.space in spaces for leg in stack.legs))
        moved = {member for stack in reordered for member in stack.members}
        return [
            name
            for name, legs in self.legs.items()
            if name in moved or any(leg.space in spaces and self._alters(leg) for leg in legs)
        ]

    def _alters(self, leg: Leg) -> bool:
        # A rotation needs gains that are one number, and leaves them so.
        return leg.variance != "gain" or self.spaces[leg.space].group.kind not in ROTATIONS
