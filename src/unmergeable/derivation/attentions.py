"""Proposals for attention: where its heads lie, and what lies between queries and keys.

Nothing here has to be right: every proposal is proven or dropped by :mod:`unmergeable.derivation.prove`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unmergeable.architecture.blocks import Attention, Heads, JoinedStream, QueryKeyNorm, ScorePart, ValueGroup
from unmergeable.architecture.declare import score_parts
from unmergeable.architecture.symmetry import Pairing
from unmergeable.derivation.probe import Source, Spot, support
from unmergeable.derivation.scene import Row, Scene, Unexplained, common_module, laid_out, layer_of
from unmergeable.derivation.streams import runs, stream_read, tokens_of
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
    sources = scene.before(call.position, layer)
    found = [_value_rows(scene, tokens_of(call.value, run), sources) for run in runs(scene, call.value, sources)]
    spots, is_normed = found[0]
    if any(normed != is_normed for _, normed in found):
        raise Unexplained("a norm sits on the values of one stream and not on those of another")
    heads = sorted({tuple(head) for head in spots}, key=lambda head: (head[0].weight, head[0].place))
    group_of = [heads.index(tuple(head)) for head in spots]
    values = [laid_out([[list(rows[group_of.index(group)])] for group in range(len(heads))]) for rows, _ in found]
    outputs, members = _outputs(scene, call, layer, sources, group_of)
    value, output = values[0], outputs[0]
    if output is None:
        raise Unexplained(_NO_READER)
    if len(values) < len(outputs):
        raise Unexplained("there are more streams of queries than of values")
    outputs += [None] * (len(values) - len(outputs))
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
            joined=tuple(JoinedStream((), (), own, read) for own, read in zip(values[1:], outputs[1:], strict=True)),
        )


def _outputs(
    scene: Scene, call: AttentionCall, layer: str, sources: list[int], group_of: Sequence[int]
) -> tuple[list[Heads | None], int]:
    """Where the result is read, for every stream of queries, and how many query heads share a group's values."""
    streams = runs(scene, call.query, sources)
    found: list[Heads | None] = [None] * len(streams)
    members, size = 0, call.value.shape[-1]
    for index, columns in _readers(scene, call, layer, count=len(streams)):
        by_head = _columns_by_head(scene, index, columns, size, group_of)
        output, members = laid_out(by_head), len(by_head[0])
        if (output.offset, output.group_stride or members * size, output.member_stride or size) != (
            0,
            members * size,
            size,
        ):
            raise Unexplained(f"{output.weight}: heads are not read in the order of their groups")
        found[stream_read(scene.trace.products[index].inputs, call.query, streams)] = output
    return found, members


def _columns_by_head(
    scene: Scene, index: int, columns: Sequence[tuple[int, int]], size: int, group_of: Sequence[int]
) -> list[list[list[Spot]]]:
    """The columns that read coordinate ``e`` of each group's values: [group][member][e].

    ``columns`` of the product ``index``, each with the coordinate of the values that it reads. Members of a group read
    the same values, and are told apart by their order among the columns.
    """
    readers: list[list[list[Spot]]] = [[[] for _ in range(size)] for _ in range(max(group_of) + 1)]
    for column, source in columns:
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


_NO_READER = "no product reads the attention's result coordinate by coordinate: a norm or a mixing lies between"


def _readers(
    scene: Scene, call: AttentionCall, layer: str, *, count: int
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """At most ``count`` products that read an attention's result, with the columns that do.

    Each column comes with the coordinate of the values that it reads; others read something else beside it.
    """
    found = 0
    for index in range(call.position, min(call.position + SOON, len(scene.trace.products))):
        product = scene.trace.products[index]
        if layer_of(product.name) != layer or found == count:
            continue
        (table,) = support(Source(product.inputs), [Source(call.value, outer=True)])
        if bool((table.sum(1) <= 1).all()) and bool(table.any(0).all()):
            found += 1
            which = table.int().argmax(1).tolist()
            yield index, [(column, which[column]) for column in torch.nonzero(table.any(1))[:, 0].tolist()]
    if not found:
        raise Unexplained(_NO_READER)


Scores = tuple[tuple[ScorePart, ...], QueryKeyNorm | None, tuple[JoinedStream, ...]]


def scores(scene: Scene, call: AttentionCall, block: Attention, epsilon: float) -> Iterator[Scores]:
    """Proposals for what lies between the queries and keys of ``block``, the largest groups first.

    ``epsilon`` is that of the network's norms. Raises Unexplained when coordinates come from rows in a way that no rule
    covers.
    """
    sources = scene.before(call.position, layer_of(scene.trace.products[call.position - 1].name))
    size = call.query.shape[-1]
    queries, keys = (
        [tokens_of(tensor, run) for run in runs(scene, tensor, sources)] for tensor in (call.query, call.key)
    )
    if not len(queries) == len(keys) == 1 + len(block.joined):
        raise Unexplained("queries, keys and values come from different numbers of streams")
    sides: list[list[list[list[Coordinate]]]] = []
    for tensors in (queries, keys):
        heads = []
        for tensor in tensors:
            every = scene.origins(Source(tensor, outer=True), sources)
            own = scene.origins(Source(tensor, outer=True), sources, first_token=True)
            if not every or any(not 1 <= len(rows) <= 2 for rows in every) or any(len(rows) != 1 for rows in own):
                yield from _normed_scores(scene, (queries, keys, call), block, sources, epsilon)
                return
            heads.append(_by_head(scene, every, own, size))
        sides.append(_with_partners(heads))
    streams = [_parts(query, key, block) for query, key in zip(*sides, strict=True)]
    yield streams[0], None, _joined(block, streams, [None] * len(streams))


def _joined(
    block: Attention, streams: Sequence[tuple[ScorePart, ...]], norms: Sequence[QueryKeyNorm | None]
) -> tuple[JoinedStream, ...]:
    """The other streams of a block with queries, keys and norms.

    Raises Unexplained where they have other parts than the first.
    """
    kinds = [[(part.size, part.rotary, part.shared_key) for part in parts] for parts in streams]
    if any(kind != kinds[0] for kind in kinds):
        raise Unexplained("two streams of one attention are rotated differently")
    return tuple(
        replace(stream, queries=tuple(part.query for part in parts), keys=tuple(part.key for part in parts), norm=norm)
        for stream, parts, norm in zip(block.joined, streams[1:], norms[1:], strict=True)
    )


def _with_partners(streams: list[list[list[Coordinate]]]) -> list[list[list[Coordinate]]]:
    """Heads of several streams, where a coordinate that one stream rotates is rotated in all of them.

    Text beside an image stands at position 0, and seems to be rotated by nothing.
    """
    merged = streams[0]
    for stream in streams[1:]:
        merged = [
            [
                one if one.partner is not None else replace(one, partner=other.partner)
                for one, other in zip(a, b, strict=True)
            ]
            for a, b in zip(merged, stream, strict=True)
        ]
    return [
        [
            [replace(own, partner=one.partner) for own, one in zip(mine, head, strict=True)]
            for mine, head in zip(stream, merged, strict=True)
        ]
        for stream in streams
    ]


def _normed_scores(
    scene: Scene,
    seen: tuple[list[Tensor], list[Tensor], AttentionCall],
    block: Attention,
    sources: list[int],
    epsilon: float,
) -> Iterator[Scores]:
    """Queries and keys behind a norm: where its rows lie, and every kind of norm and of positions that it may be.

    ``seen``: the queries and the keys of every stream, and the call they belong to.
    """
    size = seen[2].query.shape[-1]
    sides = [
        _NormedSides.of(scene, (query, key, seen[2].value), block, sources)
        for query, key in zip(seen[0], seen[1], strict=True)
    ]
    if len({side.scope for side in sides}) > 1 or len({bool(side.gains[0]) for side in sides}) > 1:
        raise Unexplained("a norm sits on the queries of one stream and not on those of another")
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for kind, offset in itertools.product(kinds, (0.0, 1.0) if sides[0].gains[0] else (0.0,)):
        norms = [side.norm(kind, epsilon, offset) for side in sides]
        # The fewer coordinates are rotated, the larger the group: a proposal that rotates more than the network does
        # may hold too, and would hide it. Behind an RMS norm over all heads, or one without gains, they make no
        # difference to the group, and one that rotates fewer would hide the rotation.
        counts = [count for count in (0, size // 4, size // 2, size) if count % 2 == 0]
        is_blind = kind == "rms" and not block.is_cross and (sides[0].scope == "full" or not sides[0].gains[0])
        for rotary in counts[::-1] if is_blind else counts:
            pairings: tuple[Pairing, ...] = ("half", "interleaved")
            for pairing in pairings if rotary else pairings[:1]:
                streams = [score_parts(side.query, side.key, size, rotary, pairing) for side in sides]
                yield streams[0], norms[0], _joined(block, streams, norms)


@dataclass(frozen=True)
class _NormedSides:
    """Queries and keys of one stream behind a norm, whose gains and biases are tensors of these names."""

    query: Heads
    key: Heads
    scope: Literal["head", "full"]
    gains: tuple[tuple[str, ...], tuple[str, ...]]
    biases: tuple[str | None, str | None]
    gain_axis: int

    @classmethod
    def of(
        cls, scene: Scene, activations: tuple[Tensor, Tensor, Tensor], block: Attention, sources: list[int]
    ) -> _NormedSides:
        """What lies between the projections and ``activations``: queries, keys and values."""
        size, member = activations[0].shape[-1], block.members
        query, scope = _mixed_heads(scene, activations[0], sources, block.num_heads)
        key, _ = _mixed_heads(scene, activations[1], sources, block.groups)
        gains = _gains(scene, activations, block.name)
        biases = [next((name for name in side if name.endswith("bias")), None) for side in gains]
        names = [tuple(name for name in side if not name.endswith("bias")) for side in gains]
        if scope == "full" and max(map(len, names)) > 1:
            raise Unexplained("several tensors look like the gains of one norm")
        if bool(names[0]) != bool(names[1]):
            raise Unexplained("only one of queries and keys has gains of its own")
        is_one = scope == "head" and len(names[0]) == 1
        axis = scene.disk.places[names[0][0]].shape.numel() != size if is_one else False
        return cls(
            laid_out([[query[g * member + m] for m in range(member)] for g in range(block.groups)]),
            laid_out([[head] for head in key]),
            scope,
            (names[0], names[1]),
            (biases[0], biases[1]),
            int(axis),
        )

    def norm(self, kind: Literal["rms", "layer"], epsilon: float, offset: float) -> QueryKeyNorm:
        return QueryKeyNorm(
            kind, self.scope, epsilon, *self.gains, *self.biases, gain_axis=self.gain_axis, offset=offset
        )


def _mixed_heads(
    scene: Scene, tensor: Tensor, sources: list[int], heads: int
) -> tuple[list[list[Spot]], Literal["head", "full"]]:
    """The rows of every head in order, where each coordinate comes from all rows of its head, or of all heads."""
    size, stored = tensor.shape[-1], tensor.shape[-3]
    nearest = sources[::-1]  # in the same layer another attention may come before, all of which is mixed
    for index, table in zip(nearest, support(Source(tensor, outer=True), scene.outputs(nearest)), strict=True):
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


def _gains(scene: Scene, activations: tuple[Tensor, Tensor, Tensor], module: str) -> tuple[list[str], list[str]]:
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
    for tensor in activations:
        found = torch.autograd.grad(tensor.square().sum(), list(owned.values()), retain_graph=True, allow_unused=True)
        seen.append({name for name, grad in zip(owned, found, strict=True) if grad is not None and bool(grad.any())})
    query, key, value = seen
    size = activations[0].shape[-1]

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
