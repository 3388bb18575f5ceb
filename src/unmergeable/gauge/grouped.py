"""Elements that leave a quantised model as it was: what is rounded together stays together.

Formats of few bits round weights in groups of 16 to 256 neighbours along a row, with one scale for each group and, in
some, a scale of scales for several. A group that is the same set of numbers, or their negatives, gets the same scale
and the same rounding. So the release, quantised, is the expert, quantised, in other coordinates, when coordinates only

    change places inside a group of 16, groups of 16 inside one of 32, and so on up to 256, groups of 256 anywhere;
    change sign 32 together, for formats whose range is not symmetric.

These permutations are the wreath product of symmetric groups S_16 wr S_2 wr S_2 wr S_2 wr S_2 wr S_(size/256): every
coordinate may come to every place, and 256 coordinates alone have (16!)^16 2^15 orders. Where a size is no multiple of
256, the largest power of two that divides it is moved as a whole. Positions in rotary pairs turn by quarters, which
move rows and no number between them. Scales would spread the numbers of a group, so that there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unmergeable.architecture.symmetry import Group, GroupKind, Space, SymmetryMap
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import Gauge
from unmergeable.gauge.groups import sample
from unmergeable.randomness import Stream

SIZES = (16, 32, 64, 128, 256)
"""Numbers that formats of few bits round together, each a multiple of the one before."""

SAME_SIGN = 32

LIMIT = "weights that are quantised together stay together"

_KEPT: Mapping[GroupKind, GroupKind] = {
    "general_linear": "signed_permutation",
    "orthogonal": "signed_permutation",
    "centred_orthogonal": "common_sign_permutation",
    "signed_permutation": "signed_permutation",
    "rotary": "quarter_turn",
    "quarter_turn": "quarter_turn",
    "pair_sign": "pair_sign",
    "block_sign": "block_sign",
    "permutation": "permutation",
    "common_sign_permutation": "common_sign_permutation",
    "diagonal": "diagonal",
}
"""What of each group does not change a quantised model; nothing is left of the groups of scales alone."""


def kept_spaces(spaces: Mapping[str, Space], symmetry: SymmetryMap) -> dict[str, Space]:
    """The spaces with what is left of their groups; without those of which nothing is left.

    Nor are signs taken from gains that are stored less one: near 1 they would lose digits.
    """
    coarse = {leg.space for tensor in symmetry.gain_offset for leg in symmetry.legs.get(tensor, ())}
    found: dict[str, Space] = {}
    for name, space in spaces.items():
        kind = _KEPT.get(space.group.kind)
        if kind is None or (kind == "diagonal" and name in coarse):
            continue
        if kind == space.group.kind and kind in ("quarter_turn", "pair_sign", "block_sign"):
            found[name] = space
            continue
        pairing = space.group.pairing if kind == "quarter_turn" else None
        limit = space.limit if space.role == "experts" else f"{space.limit}; {LIMIT}".removeprefix("; ")
        found[name] = replace(space, group=Group(kind, pairing), limit=limit)
    return found


def kept_gauge(spaces: Mapping[str, Space], symmetry: SymmetryMap, stream: Stream) -> Gauge:
    """A random element of every one of :func:`kept_spaces`."""
    # How many neighbours on an axis a coordinate stands for: one, but of a head all of its numbers.
    widths = dict.fromkeys(spaces, 1)
    for every in symmetry.legs.values():
        for leg in every:
            if leg.space in widths:
                widths[leg.space] = max(widths[leg.space], leg.element_stride)
    return Gauge(spaces, lambda name: sample_kept(spaces[name], stream.child(name), width=widths[name]))


def sample_kept(space: Space, stream: Stream, *, width: int = 1) -> Element:
    """A random element of a space of :func:`kept_spaces`, whose coordinates are ``width`` neighbours each."""
    kind = space.group.kind
    if space.role == "experts" or kind in ("quarter_turn", "pair_sign", "block_sign"):
        return sample(space, stream, 1.0)
    shape = (space.blocks, space.size)
    order = torch.arange(space.size).expand(shape).clone()
    if kind != "diagonal":
        order = permutations(space.blocks, sizes_within(space.size, width), space.size, stream.child("permutation"))
    scale = torch.ones(shape, dtype=torch.float64)
    if kind == "common_sign_permutation":
        scale = torch.from_numpy(stream.child("sign").signs(space.blocks, 1)).double().expand(shape).contiguous()
    elif kind in ("signed_permutation", "diagonal"):
        unit = same_sign(space.size)
        signs = torch.from_numpy(stream.child("sign").signs(space.blocks, space.size // unit)).double()
        scale = signs.repeat_interleave(unit, dim=1)
    return Monomial(order, scale)


def same_sign(size: int) -> int:
    """How many neighbours of ``size`` coordinates share a sign: the largest power of two that divides it, up to 32."""
    return min(SAME_SIGN, size & -size)


def sizes_within(size: int, width: int = 1) -> tuple[int, ...]:
    """The numbers of coordinates, ``width`` neighbours each, that are rounded together and divide ``size``."""
    return tuple(
        group // width for group in SIZES if group % width == 0 and group > width and size % (group // width) == 0
    )


def permutations(blocks: int, sizes: tuple[int, ...], size: int, stream: Stream) -> Tensor:
    """Random orders that keep groups of all ``sizes``, each dividing the next; int64 [blocks, size]."""
    index = torch.arange(size).expand(blocks, size)
    whole = size
    for piece in (*reversed(sizes), 1):
        nodes, pieces = size // whole, whole // piece
        drawn = torch.from_numpy(stream.child(f"groups of {piece}").permutations(blocks * nodes, pieces))
        places = drawn.view(blocks, nodes, pieces, 1).expand(-1, -1, -1, piece)
        index = index.reshape(blocks, nodes, pieces, piece).gather(2, places).reshape(blocks, size)
        whole = piece
    return index.contiguous()


def cheapest_order(cost: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``index`` int64 [size] with the least total ``cost[i, index[i]]`` of all orders that keep groups of ``sizes``.

    From the smallest groups up: what it costs that one group comes to the place of another is an assignment problem of
    its members, whose costs the level below has found. As many problems as there are pairs of groups, of 16 members,
    then of two, and one of whole groups.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # a second, only where needed

    costs = cost.double().numpy()
    levels: list[np.ndarray] = []
    pieces = 1
    for group in sizes:
        members = group // pieces
        costs, found = _assigned(costs, members)
        levels.append(found)
        pieces = group
    top = linear_sum_assignment(costs)[1]
    order = np.asarray(top)
    for found in reversed(levels):
        inner = found[np.arange(len(order)), order]  # [groups, members], places inside the group that comes here
        order = (order[:, None] * found.shape[2] + inner).reshape(-1)
    return torch.from_numpy(order.astype(np.int64))


def _assigned(costs: np.ndarray, members: int) -> tuple[np.ndarray, np.ndarray]:
    """The least cost of every pair of groups of ``members``, and for each the member that comes to each place."""
    groups = len(costs) // members
    from scipy.optimize import linear_sum_assignment

    pairs = costs.reshape(groups, members, groups, members).transpose(0, 2, 1, 3)
    if members == 2:
        straight = pairs[..., 0, 0] + pairs[..., 1, 1]
        crossed = pairs[..., 0, 1] + pairs[..., 1, 0]
        crosses = crossed < straight
        return np.where(crosses, crossed, straight), np.stack([crosses, ~crosses], axis=-1).astype(np.int64)
    found = np.empty((groups, groups, members), dtype=np.int64)
    least = np.empty((groups, groups))
    for first in range(groups):
        for second in range(groups):
            table = pairs[first, second]
            rows, columns = linear_sum_assignment(table)
            found[first, second] = columns
            least[first, second] = table[rows, columns].sum()
    return least, found
