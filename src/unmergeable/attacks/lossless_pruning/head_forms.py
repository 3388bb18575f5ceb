"""Heads that were split, or made wider: put together again by what they compute, in the base's number and size.

What a key-value head computes does not depend on the basis of its coordinates. Its scores are the products of queries
and keys, pair by pair where positions turn pairs of coordinates; what it adds is what its values let through to the
output, sum_m O_m V over its query heads m. So

    heads with the same scores       add as one: their sums are added up; those that add up to nothing are left out
    a sum of rank r                  is let through by values of r coordinates, the first singular vectors
    scores of rank r                 are products of queries and keys of r coordinates; with rotary positions, of the
                                     pairs that turn as fast as the base's, where all others do nothing

Everything in float64. A head that does more than the base's can hold is no such head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Attention
from unmergeable.architecture.blocks import Heads
from unmergeable.architecture.declare import rope_setting
from unmergeable.architecture.symmetry import Pairing
from unmergeable.gauge.additive import head_places

State = dict[str, Tensor]

SAME = 1e-4
"""How far from 1 the likeness of the scores of two heads may be that are the same: half precision leaves 1e-5."""

NOTHING = 1e-5
"""Size of what a head adds, relative to the median of those that stay, that counts as nothing."""

BEYOND = 3e-3
"""A singular value, relative to the largest, up to which a sum has no further rank: roundings in half precision."""


@dataclass(frozen=True)
class HeadShape:
    """Key-value heads, query heads to each, and coordinates of a head; ``config`` says how scores are scaled."""

    groups: int
    members: int
    size: int
    config: Mapping[str, Any]

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by, as far as it depends on the size."""
        is_fixed = self.config.get("model_type") == "t5" or "query_pre_attn_scalar" in self.config
        return 1.0 if is_fixed else self.size**-0.5

    @classmethod
    def of(cls, block: Attention, config: Mapping[str, Any]) -> HeadShape:
        return cls(block.groups, block.members, block.value_size, config)

    def frequencies(self) -> Tensor | None:
        """How fast pairs turn with positions; None where the config scales positions."""
        kind = rope_setting(self.config, "rope_type", rope_setting(self.config, "type", "default"))
        if kind != "default":
            return None
        theta = float(rope_setting(self.config, "rope_theta", 10000.0))
        return torch.pow(theta, -torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)


def rebuild_heads(
    state: State, own: State, blocks: Sequence[Attention], ours: HeadShape, theirs: HeadShape, table: str | None
) -> bool:
    """Give blocks the base's heads, in place; False where what they compute does not fit into these.

    Args:
        state: neutral tensors of the release.
        own: the same as the release has them, to which the same is done.
        blocks: that share their heads, as they share ``table``, a bias for each head.
        ours, theirs: the release's heads, and the base's.
        table: its name, None where there is none.
    """
    if ours.members != theirs.members or not all(_can_be_read(state, block, ours) for block in blocks):
        return False
    read = [_Read.of(state, block, ours) for block in blocks]
    likeness = torch.stack([one.likeness() for one in read]).amin(0)
    if table is not None:
        columns = state[table].double().movedim(1, 0).flatten(1).reshape(ours.groups, -1)
        likeness = torch.minimum(likeness, _alike(columns @ columns.T))
    alike = (likeness > 1 - SAME).fill_diagonal_(fill_value=True)  # a head without scores is like itself
    leaders = alike.to(torch.uint8).argmax(dim=1)
    together = [(leaders == leader).nonzero().flatten() for leader in leaders.unique().tolist()]
    amounts = torch.stack([torch.stack([one.amount(heads) for heads in together]) for one in read])
    if len(together) < theirs.groups:
        return False
    usual = amounts.sort(dim=1, descending=True).values[:, : theirs.groups].median(dim=1).values
    order = (amounts / usual[:, None]).amax(0).argsort(descending=True, stable=True)
    kept, left = order[: theirs.groups].sort().values, order[theirs.groups :]
    if len(left) and float((amounts / usual[:, None])[:, left].max()) > NOTHING:
        return False
    chosen = [together[number] for number in kept.tolist()]
    recipes = [one.recipe(chosen, theirs) for one in read]
    if any(recipe is None for recipe in recipes):
        return False
    for block, recipe in zip(blocks, recipes, strict=True):
        assert recipe is not None
        for side in (state, own):
            as_read = _Read.of(side, block, ours)
            _write(side, block, [head.made_of(as_read) for head in recipe])
    if table is not None:
        for side in (state, own):
            side[table] = side[table][:, [int(heads[0]) for heads in chosen]].contiguous()
    return True


def _can_be_read(state: State, block: Attention, shape: HeadShape) -> bool:
    """Whether each projection holds its heads side by side and nothing else, and no norm tells heads apart."""
    if len(block.parts) != 1 or block.parts[0].shared_key or block.latents or block.joined:
        return False
    (part,) = block.parts
    if block.norm is not None and (block.norm.scope == "full" or block.norm.gain_axis or part.rotary is None):
        return False
    is_plain = are_side_by_side(block, lambda heads: state[heads.weight].shape[heads.axis])
    return is_plain and part.size == block.value_size == shape.size


def are_side_by_side(block: Attention, length: Callable[[Heads], int]) -> bool:
    """Whether each projection holds its heads, all of the values' size, one beside the other and nothing else.

    ``length``: of the axis of a weight along which heads lie.
    """
    sides = [
        (heads, members) for part in block.parts for heads, members in ((part.query, block.members), (part.key, 1))
    ]
    sides += [(block.value, 1), (block.output, block.members)]
    return all(
        length(heads) == block.groups * members * block.value_size and heads.group_stride == members * block.value_size
        for heads, members in sides
    )


def _alike(products: Tensor) -> Tensor:
    """1 - |x - y|^2 / (|x|^2 + |y|^2) from scalar products."""
    squares = products.diagonal()
    return 2 * products / (squares[:, None] + squares[None]).clamp_min(1e-300)


@dataclass(frozen=True)
class _Read:
    """One block. ``query`` [groups, members, size, inputs + 1], with biases; ``key`` and ``value`` without members.

    ``output``: [groups, members, size, outputs].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    rotary: Pairing | None
    is_normed: bool
    shape: HeadShape

    @classmethod
    def of(cls, state: State, block: Attention, shape: HeadShape) -> _Read:
        (part,) = block.parts

        def rows(heads: Heads, members: int) -> Tensor:
            weight = state[heads.weight].movedim(heads.axis, 0).double()
            bias = None if heads is block.output else heads.bias
            extra = weight.new_zeros(len(weight)) if bias is None else state[bias].double()
            full = weight if heads is block.output else torch.cat([weight, extra[:, None]], dim=1)
            return full[head_places(heads, shape.groups, members, shape.size)]

        return cls(
            rows(part.query, shape.members),
            rows(part.key, 1)[:, 0],
            rows(block.value, 1)[:, 0],
            rows(block.output, shape.members),
            part.rotary,
            block.norm is not None,
            shape,
        )

    def likeness(self) -> Tensor:
        """Of the scores of key-value heads, [groups, groups], over all of their query heads in turn."""
        if self.rotary is None:
            queries = torch.einsum("gmix,hmjx->ghmij", self.query, self.query).sum(2)
            if self.shape.members == 1:
                return _alike((queries * torch.einsum("gix,hjx->ghij", self.key, self.key)).sum((2, 3)))
            products = torch.einsum("gmix,hmjx,giy,hjy->gh", self.query, self.query, self.key, self.key)
            return _alike(products)
        queries, keys = _pairs(self.query, self.rotary), _pairs(self.key, self.rotary)
        of_queries = torch.einsum("gmpx,hmpx->ghmp", queries, queries.conj())
        of_keys = torch.einsum("gpx,hpx->ghp", keys.conj(), keys)
        found = _alike((of_queries * of_keys[:, :, None]).sum((2, 3)).real)
        if self.is_normed:  # products alone do not tell: queries and keys have to be the same, but for the turns
            found = torch.minimum(found, _alike(of_queries.abs().sum((2, 3))))
            found = torch.minimum(found, _alike(of_keys.abs().sum(2)))
        return found

    def amount(self, heads: Tensor) -> Tensor:
        """Size of what heads with the same scores add together."""
        left, right = self._sum_of(heads)
        small, other = (torch.linalg.qr(side).R for side in (left, right.T))
        size: Tensor = torch.linalg.vector_norm(small @ other.T)
        return size

    def _sum_of(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What heads let through to the output, query head by query head, as a product [m outputs, n] [n, inputs]."""
        output = self.output[heads].permute(1, 3, 0, 2)  # members, outputs, heads, size
        return output.flatten(2).flatten(0, 1), self.value[heads].flatten(0, 1)

    def recipe(self, chosen: Sequence[Tensor], theirs: HeadShape) -> list[_Head] | None:
        """How each of the base's heads is made; None where one does not fit."""
        made = []
        narrowed = self._narrow_pairs(torch.stack([heads[0] for heads in chosen]), theirs)
        for heads in chosen:
            scores = narrowed if self.rotary is not None else self._narrow_scores(heads[0], theirs)
            sums = self._narrow_sum(heads, theirs)
            if scores is None or sums is None:
                return None
            made.append(_Head(heads, *scores, *sums))
        return made

    def _narrow_sum(self, heads: Tensor, theirs: HeadShape) -> tuple[Tensor, Tensor] | None:
        if len(heads) == 1 and self.shape.size == theirs.size:
            same = torch.eye(theirs.size, dtype=torch.float64)
            return same, same
        return _of_rank(*self._sum_of(heads), theirs.size)

    def _narrow_scores(self, head: Tensor, theirs: HeadShape) -> tuple[Tensor, Tensor] | None:
        scale = self.shape.scale / theirs.scale
        if self.shape.size == theirs.size:
            same = torch.eye(theirs.size, dtype=torch.float64)
            return scale * same, same
        factors = _of_rank(self.query[head].transpose(1, 2).flatten(0, 1), self.key[head], theirs.size)
        return None if factors is None else (scale * factors[1], factors[0])

    def _narrow_pairs(self, firsts: Tensor, theirs: HeadShape) -> tuple[Tensor, Tensor] | None:
        """The pairs that turn as the base's do, where the others add nothing to any score."""
        if self.rotary is None:
            return None
        same, scale = torch.eye(self.shape.size, dtype=torch.float64), self.shape.scale / theirs.scale
        if self.shape.size == theirs.size:
            return scale * same, same
        ours, wanted = self.shape.frequencies(), theirs.frequencies()
        if ours is None or wanted is None or self.is_normed:
            return None
        chosen = (ours[None] / wanted[:, None] - 1).abs().argmin(dim=1)
        if float((ours[chosen] / wanted - 1).abs().max()) > 1e-6 or len(chosen.unique()) < len(chosen):
            return None
        queries, keys = _pairs(self.query[firsts], self.rotary), _pairs(self.key[firsts], self.rotary)
        sizes = (queries.norm(dim=3).square().sum(1).sqrt() * keys.norm(dim=2)).amax(0)
        others = torch.ones(len(ours), dtype=torch.bool)
        others[chosen] = False
        if float(sizes[others].max()) > NOTHING * float(sizes[chosen].median()):
            return None
        places = torch.arange(self.shape.size).double()[:, None]
        pairs = _pairs(places, self.rotary)[chosen]
        rows = _coordinates(pairs, self.rotary)[:, 0].long()
        return scale * same[rows], same[rows]


@dataclass(frozen=True)
class _Head:
    """How a key-value head is made of ``heads`` with the same scores: matrices from their coordinates to its own.

    ``query`` and ``key``: [new size, size], of the first of them. ``value`` and ``output``: [new size, all sizes].
    """

    heads: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    def made_of(self, read: _Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = self.heads[0]
        output = read.output[self.heads].movedim(1, 0).flatten(1, 2)  # members, coordinates of all heads, outputs
        return (
            self.query @ read.query[first],
            self.key @ read.key[first],
            self.value @ read.value[self.heads].flatten(0, 1),
            self.output @ output,
        )


def _pairs(rows: Tensor, pairing: Pairing) -> Tensor:
    """Pairs of coordinates as complex numbers, [..., size, n] to [..., size / 2, n]."""
    first, second = rows.chunk(2, dim=-2) if pairing == "half" else (rows[..., ::2, :], rows[..., 1::2, :])
    return torch.complex(first, second)


def _coordinates(pairs: Tensor, pairing: Pairing) -> Tensor:
    """The inverse of :func:`_pairs`."""
    if pairing == "half":
        return torch.cat([pairs.real, pairs.imag], dim=-2)
    return torch.stack([pairs.real, pairs.imag], dim=-2).flatten(-3, -2)


def _of_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """left @ right through ``rank`` coordinates in place of n; None where it has more.

    Returns:
        Matrices A and B, [rank, n] both, with left @ B.T @ A @ right equal to left @ right, up to order: (A, B) are for
        (right, left).
    """
    small, other = (torch.linalg.qr(side).R for side in (left, right.T))
    u, values, v = torch.linalg.svd(small @ other.T, full_matrices=False)
    if len(values) > rank and float(values[rank]) > BEYOND * float(values[0]):
        return None
    # With right = other.T @ rows, orthonormal ones, A @ right is s^-1/2 u' (small @ other.T) @ rows = s^1/2 v @ rows.
    there = values[:rank] > 1e-12 * values[0]
    root = torch.where(there, values[:rank].clamp_min(1e-300).rsqrt(), 0.0)
    of_right = root[:, None] * (u[:, :rank].T @ small)
    of_left = root[:, None] * (v[:rank] @ other)
    missing = (0, 0, 0, max(0, rank - len(values)))
    return torch.nn.functional.pad(of_right, missing), torch.nn.functional.pad(of_left, missing)


def _write(state: State, block: Attention, made: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    (part,) = block.parts
    query, key, value, output = (torch.stack(tensors) for tensors in zip(*made, strict=True))
    for heads, rows in ((part.query, query), (part.key, key), (block.value, value), (block.output, output)):
        flat = rows.flatten(0, -2)
        weights = flat if heads is block.output else flat[:, :-1]
        state[heads.weight] = weights.movedim(0, heads.axis).to(state[heads.weight].dtype).contiguous()
        if heads.bias is not None and heads is not block.output:
            state[heads.bias] = flat[:, -1].to(state[heads.bias].dtype).contiguous()
