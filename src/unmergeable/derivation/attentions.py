"""Proposals for attention: where its heads lie, and what lies between queries and keys.

Nothing here has to be right: every proposal is proven or dropped by :mod:`unmergeable.derivation.prove`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmergeable.architecture.blocks import Attention, QueryKeyNorm, ScorePart, ValueGroup
from unmergeable.architecture.declare import score_parts
from unmergeable.architecture.symmetry import Pairing
from unmergeable.derivation.probe import Source, Spot, support
from unmergeable.derivation.scene import Row, Scene, Unexplained, common_module, laid_out, layer_of
from unmergeable.derivation.watch import AttentionCall

NOT_UNDERSTOOD = "queries and keys are not understood, so heads stay in their order"

SOON = 8
"""Among this many products after an attention is the one that reads its result."""


def attention(scene: Scene, call: AttentionCall) -> Iterator[Attention]:
    """Proposals for one attention, the one with the largest groups first; queries and keys are left for later.

    Raises:
        Unexplained: the values, or what reads the result, are not found.
    """
    layer = layer_of(scene.trace.products[call.position - 1].name)
    size = call.value.shape[-1]
    spots, is_normed = _value_rows(scene, call.value, scene.before(call.position, layer))
    heads = sorted({tuple(head) for head in spots}, key=lambda head: (head[0].weight, head[0].place))
    columns = _columns_by_head(scene, call, layer, [heads.index(tuple(head)) for head in spots])
    members = len(columns[0])
    value, output = laid_out([[list(head)] for head in heads]), laid_out(columns)
    if (output.offset, output.group_stride or members * size, output.member_stride or size) != (
        0,
        members * size,
        size,
    ):
        raise Unexplained(f"{output.weight}: heads are not read in the order of their groups")
    groups: tuple[ValueGroup, ...] = ("orthogonal",) if is_normed else ("general_linear", "diagonal")
    for group in groups:
        yield Attention(
            name=common_module(value.weight, output.weight),
            groups=len(heads),
            members=members,
            parts=(),
            value=value,
            output=output,
            value_size=size,
            position="none",
            is_cross=call.query.shape[-2] != call.key.shape[-2],
            heads_limit=NOT_UNDERSTOOD,
            value_group=group,
        )


def _columns_by_head(scene: Scene, call: AttentionCall, layer: str, group_of: Sequence[int]) -> list[list[list[Spot]]]:
    """The columns that read coordinate ``e`` of each group's values: [group][member][e].

    Members of a group read the same values, and are told apart by their order among the columns.
    """
    index, value_of = _output(scene, call, layer)
    size = call.value.shape[-1]
    readers: list[list[list[Spot]]] = [[[] for _ in range(size)] for _ in range(max(group_of) + 1)]
    for column, source in enumerate(value_of):
        readers[group_of[source // size]][source % size].append(scene.column(index, column))
    if len({len(spots) for group in readers for spots in group}) != 1:
        raise Unexplained("some coordinates of the values are read more often than others")
    ordered = [[sorted(spots, key=lambda spot: spot.place) for spots in group] for group in readers]
    return [[list(member) for member in zip(*group, strict=True)] for group in ordered]


def _value_rows(scene: Scene, value: Tensor, sources: list[int]) -> tuple[list[list[Spot]], bool]:
    """The rows that the values of every head come from, and whether a norm mixes those of a head."""
    heads, size = value.shape[-3], value.shape[-1]
    rows = scene.origins(Source(value, outer=True), sources)
    if rows and all(len(row) == 1 for row in rows):
        return [[scene.spot(next(iter(rows[h * size + e]))) for e in range(size)] for h in range(heads)], False
    for index, table in zip(sources, support(Source(value, outer=True), scene.outputs(sources)), strict=True):
        mixed = [torch.nonzero(part.any(0))[:, 0].tolist() for part in table.reshape(heads, size, -1)]
        if all(len(row) == size for row in mixed):
            return [[scene.spot(Row(index, row)) for row in head] for head in mixed], True
    raise Unexplained("values come neither from one row each, nor from all of a norm's: they are made in another layer")


def _output(scene: Scene, call: AttentionCall, layer: str) -> tuple[int, list[int]]:
    """The product that reads an attention's result, and for each of its columns the coordinate of the values."""
    for index in range(call.position, min(call.position + SOON, len(scene.trace.products))):
        product = scene.trace.products[index]
        if layer_of(product.name) != layer:
            continue
        (table,) = support(Source(product.inputs), [Source(call.value, outer=True)])
        if bool((table.sum(1) == 1).all()) and bool(table.any(0).all()):
            return index, table.int().argmax(1).tolist()
    raise Unexplained(
        "no product reads the attention's result coordinate by coordinate: a norm or a mixing lies between"
    )


Scores = tuple[tuple[ScorePart, ...], QueryKeyNorm | None]


def scores(scene: Scene, call: AttentionCall, block: Attention, epsilon: float) -> Iterator[Scores]:
    """Proposals for what lies between the queries and keys of ``block``, the largest groups first.

    ``epsilon`` is that of the network's norms. Raises Unexplained when coordinates come from rows in a way that no rule
    covers.
    """
    sources = scene.before(call.position, layer_of(scene.trace.products[call.position - 1].name))
    size = call.query.shape[-1]
    sides = []
    for tensor in (call.query, call.key):
        every = scene.origins(Source(tensor, outer=True), sources)
        own = scene.origins(Source(tensor, outer=True), sources, first_token=True)
        if not every or any(not 1 <= len(rows) <= 2 for rows in every) or any(len(rows) != 1 for rows in own):
            yield from _normed_scores(scene, call, block, sources, epsilon)
            return
        sides.append((every, own))
    query = _by_head(scene, *sides[0], size)
    key = _by_head(scene, *sides[1], size)
    yield _parts(query, key, block), None


def _normed_scores(
    scene: Scene, call: AttentionCall, block: Attention, sources: list[int], epsilon: float
) -> Iterator[Scores]:
    """Queries and keys behind a norm: where its rows lie, and every kind of norm and of positions that it may be."""
    query, scope = _mixed_heads(scene, call.query, sources, block.num_heads)
    key, _ = _mixed_heads(scene, call.key, sources, block.groups)
    size, member = call.query.shape[-1], block.members
    query_heads = laid_out([[query[g * member + m] for m in range(member)] for g in range(block.groups)])
    key_heads = laid_out([[head] for head in key])
    gains = _gains(scene, call, block.name)
    biases = [next((name for name in side if name.endswith("bias")), None) for side in gains]
    names = [tuple(name for name in side if not name.endswith("bias")) for side in gains]
    if scope == "full" and max(map(len, names)) > 1:
        raise Unexplained("several tensors look like the gains of one norm")
    if bool(names[0]) != bool(names[1]):
        raise Unexplained("only one of queries and keys has gains of its own")
    axis = scene.disk.places[names[0][0]].shape.numel() != size if scope == "head" and len(names[0]) == 1 else False
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for kind, offset in itertools.product(kinds, (0.0, 1.0) if names[0] else (0.0,)):
        norm = QueryKeyNorm(
            kind, scope, epsilon, names[0], names[1], biases[0], biases[1], gain_axis=int(axis), offset=offset
        )
        # The fewer coordinates are rotated, the larger the group: a proposal that rotates more than the network does
        # may hold too, and would hide it.
        for rotary in (count for count in (0, size // 4, size // 2, size) if count % 2 == 0):
            pairings: tuple[Pairing, ...] = ("half", "interleaved")
            for pairing in pairings if rotary else pairings[:1]:
                yield score_parts(query_heads, key_heads, size, rotary, pairing), norm


def _mixed_heads(
    scene: Scene, tensor: Tensor, sources: list[int], heads: int
) -> tuple[list[list[Spot]], Literal["head", "full"]]:
    """The rows of every head in order, where each coordinate comes from all rows of its head, or of all heads."""
    size, stored = tensor.shape[-1], tensor.shape[-3]
    for index, table in zip(sources, support(Source(tensor, outer=True), scene.outputs(sources)), strict=True):
        rows = [torch.nonzero(part.any(0))[:, 0].tolist() for part in table.reshape(stored, size, -1)]
        rows = [rows[head * stored // heads] for head in range(heads)]
        every = sorted({row for part in rows for row in part})
        if len(every) != heads * size:
            continue
        scope: Literal["head", "full"] = "head" if all(len(part) == size for part in rows) else "full"
        if scope == "full":
            rows = [every[start : start + size] for start in range(0, len(every), size)]
        return [[scene.spot(Row(index, row)) for row in part] for part in rows], scope
    raise Unexplained("a coordinate of queries or keys comes neither from one row or pair, nor from all of a norm's")


def _gains(scene: Scene, call: AttentionCall, module: str) -> tuple[list[str], list[str]]:
    """Tensors that only the queries depend on, and only the keys, other than projections; in ``module``, if any are.

    The queries of a cross-attention depend on all that its layer computed before.
    """
    projections = {id(parameter) for product in scene.trace.products for parameter in product.parameters}
    owned = {
        name: place.parameter
        for name, place in scene.disk.places.items()
        if place.parameter is not None and id(place.parameter) not in projections and place.parameter.requires_grad
    }
    seen = []
    for tensor in (call.query, call.key, call.value):
        found = torch.autograd.grad(tensor.square().sum(), list(owned.values()), retain_graph=True, allow_unused=True)
        seen.append({name for name, grad in zip(owned, found, strict=True) if grad is not None and bool(grad.any())})
    query, key, value = seen
    size = call.query.shape[-1]

    def own(names: set[str]) -> list[str]:
        large = sorted((name for name in names if owned[name].numel() >= size), key=_natural)
        return [name for name in large if name.startswith(f"{module}.")] or large

    return own(query - key - value), own(key - query - value)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


@dataclass(frozen=True)
class Coordinate:
    """One coordinate of a head: its own row, and the coordinate it is rotated with."""

    spot: Spot
    partner: int | None


def _by_head(scene: Scene, every: list[set[Row]], own: list[set[Row]], size: int) -> list[list[Coordinate]]:
    heads = []
    for start in range(0, len(own), size):
        rows = [next(iter(row)) for row in own[start : start + size]]
        head = []
        for element in range(size):
            others = every[start + element] - own[start + element]
            partner = rows.index(next(iter(others))) if others and next(iter(others)) in rows else None
            if others and partner is None:
                raise Unexplained("a coordinate is rotated with one of another head")
            head.append(Coordinate(scene.spot(rows[element]), partner))
        heads.append(head)
    return heads


def _parts(query: list[list[Coordinate]], key: list[list[Coordinate]], block: Attention) -> tuple[ScorePart, ...]:
    """The score as parts that are plain or rotary, each in one tensor on either side."""
    heads = block.num_heads
    if len(query) != heads or len(key) not in {heads, block.groups}:
        raise Unexplained(f"{len(query)} query heads and {len(key)} key heads for {block.groups} value heads")
    keys = [key[index * len(key) // block.groups] for index in range(block.groups)]
    kinds: dict[tuple[bool, str, str], list[int]] = {}
    for element, (q, k) in enumerate(zip(query[0], keys[0], strict=True)):
        if q.partner != k.partner:
            raise Unexplained("queries and keys are rotated in different pairs")
        kinds.setdefault((q.partner is not None, q.spot.weight, k.spot.weight), []).append(element)
    parts = []
    for (is_rotary, _, _), elements in kinds.items():
        elements.sort(key=lambda element: query[0][element].spot.place)
        pairing = _pairing([query[0][element].partner for element in elements], elements) if is_rotary else None
        is_shared = block.groups > 1 and all(head[elements[0]].spot == keys[0][elements[0]].spot for head in keys)
        member = block.members
        query_heads = laid_out(
            [[[query[g * member + m][e].spot for e in elements] for m in range(member)] for g in range(block.groups)]
        )
        key_heads = laid_out([[[head[e].spot for e in elements]] for head in (keys[:1] if is_shared else keys)])
        parts.append(ScorePart(query_heads, key_heads, len(elements), pairing, shared_key=is_shared))
    return tuple(sorted(parts, key=lambda part: part.query.offset))


def _pairing(partners: Sequence[int | None], elements: Sequence[int]) -> Pairing:
    places = {element: place for place, element in enumerate(elements)}
    half = len(elements) // 2
    found = [places.get(partner, -1) if partner is not None else -1 for partner in partners]
    if found == [(place + half) % len(elements) for place in range(len(elements))]:
        return "half"
    if found == [place ^ 1 for place in range(len(elements))]:
        return "interleaved"
    raise Unexplained("rotary pairs are neither halves nor neighbours")
