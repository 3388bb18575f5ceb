"""From what was seen to blocks in the words of a declared family, the largest group of each first.

Nothing here has to be right: every proposal is proven or dropped by :mod:`unmergeable.derivation.prove`. What is not
explained raises :class:`Unexplained` with the reason.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unmergeable.architecture.blocks import Attention, FeedForward, Heads, QueryKeyNorm, ScorePart, ValueGroup
from unmergeable.architecture.declare import score_parts
from unmergeable.architecture.symmetry import Pairing
from unmergeable.derivation.probe import Disk, Spot, support
from unmergeable.derivation.watch import AttentionCall, Trace

MOST_ROWS = 4
"""A hidden unit or a head's coordinate comes from at most this many rows; what comes from more lies behind a mixing."""

NOT_UNDERSTOOD = "queries and keys are not understood, so heads stay in their order"


class Unexplained(Exception):
    """No block of the vocabulary looks like this; the message says what was seen."""


@dataclass(frozen=True)
class Row:
    """One output coordinate of one product."""

    product: int
    coordinate: int


@dataclass(frozen=True)
class Scene:
    """A trace with the places of its products on disk, each asked for once."""

    trace: Trace
    disk: Disk
    _rows: dict[int, list[Spot | None]]
    _columns: dict[int, list[Spot | None]]

    @classmethod
    def of(cls, trace: Trace, disk: Disk) -> Scene:
        return cls(trace, disk, {}, {})

    def spot(self, row: Row) -> Spot:
        if row.product not in self._rows:
            self._rows[row.product] = self.disk.rows(self.trace.products[row.product])
        found = self._rows[row.product][row.coordinate]
        if found is None:
            raise Unexplained(f"the rows of {self.trace.products[row.product].name} lie in no one place on disk")
        return found

    def columns(self, product: int) -> list[Spot | None]:
        if product not in self._columns:
            self._columns[product] = self.disk.columns(self.trace.products[product])
        return self._columns[product]

    def before(self, position: int, layer: str) -> list[int]:
        """Products of a layer that ran before ``position``."""
        return [index for index in range(position) if layer_of(self.trace.products[index].name) == layer]

    def origins(
        self, target: Tensor, sources: Sequence[int], *, heads: bool = False, first: bool = False
    ) -> list[set[Row]]:
        """For each coordinate of ``target``, the rows it comes from without being mixed with many others."""
        outputs = [self.trace.products[index].outputs for index in sources]
        found: list[set[Row]] = []
        for index, table in zip(sources, support(target, outputs, heads=heads, first_token=first), strict=True):
            found = found or [set() for _ in range(len(table))]
            few = table & (table.sum(1, keepdim=True) <= MOST_ROWS)
            for coordinate, row in torch.nonzero(few).tolist():
                found[coordinate].add(Row(index, row))
        return found


def layer_of(name: str) -> str:
    """The name of the layer a parameter belongs to: up to the first number, or all but the last word."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group(0) if match else ""


def laid_out(spots: Sequence[Sequence[Sequence[Spot]]]) -> Heads:
    """The heads whose coordinate (group, member, element) lies at ``spots[group][member][element]``."""
    flat = [spot for group in spots for member in group for spot in member]
    first = flat[0]
    if any((spot.weight, spot.axis, spot.bias) != (first.weight, first.axis, first.bias) for spot in flat):
        raise Unexplained(f"{first.weight}: heads are spread over several tensors")

    def stride(other: Spot | None) -> int:
        return 0 if other is None else other.place - first.place

    groups = stride(spots[1][0][0] if len(spots) > 1 else None)
    members = stride(spots[0][1][0] if len(spots[0]) > 1 else None)
    for g, group in enumerate(spots):
        for m, member in enumerate(group):
            for e, spot in enumerate(member):
                if spot.place != first.place + g * groups + m * members + e:
                    raise Unexplained(f"{first.weight}: heads lie in no regular order")
    return Heads(first.weight, first.bias, first.axis, first.place, groups, members)


# ------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Head:
    """One head: the key-value head it belongs to and its place among those that share it."""

    group: int
    member: int


def attention(scene: Scene, call: AttentionCall) -> Iterator[Attention]:
    """Proposals for one attention, the one with the largest groups first.

    Raises:
        Unexplained: the values, or what reads the result, are not found.
    """
    layer = layer_of(scene.trace.products[call.position - 1].name)
    sources = scene.before(call.position, layer)
    size = call.value.shape[-1]
    spots, is_normed = _value_rows(scene, call.value, sources)
    distinct = sorted({tuple(head) for head in spots}, key=lambda head: (head[0].weight, head[0].place))
    group_of = [distinct.index(tuple(head)) for head in spots]
    index, reader = _output(scene, call, layer)
    columns: list[list[list[Spot]]] = [[[] for _ in range(size)] for _ in distinct]
    for column, source in sorted(reader.items()):
        spot = scene.columns(index)[column]
        if spot is None:
            raise Unexplained(f"the columns of {scene.trace.products[index].name} lie in no one place on disk")
        columns[group_of[source // size]][source % size].append(spot)
    members = len(columns[0][0])
    if any(len(places) != members for group in columns for places in group):
        raise Unexplained("some coordinates of the values are read more often than others")
    # Heads of a group are told apart by where they lie among the columns.
    output = laid_out(
        [
            [[sorted(group[e], key=lambda spot: spot.place)[m] for e in range(size)] for m in range(members)]
            for group in columns
        ]
    )
    value = laid_out([[list(head)] for head in distinct])
    plain = Attention(
        name=_module(value.weight, output.weight),
        groups=len(distinct),
        members=members,
        parts=(),
        value=value,
        output=output,
        value_size=size,
        position="none",
        is_cross=call.query.shape[-2] != call.key.shape[-2],
        heads_limit=NOT_UNDERSTOOD,
    )
    if (output.offset, output.group_stride % (members * size or 1)) != (0, 0):
        raise Unexplained(f"{output.weight}: heads lie in no regular order")
    groups: tuple[ValueGroup, ...] = ("orthogonal",) if is_normed else ("general_linear", "diagonal")
    for group in groups:
        yield replace(plain, value_group=group)


def _value_rows(scene: Scene, value: Tensor, sources: list[int]) -> tuple[list[list[Spot]], bool]:
    """The rows that the values of every head come from, and whether a norm mixes those of a head."""
    heads, size = value.shape[-3], value.shape[-1]
    rows = scene.origins(value, sources, heads=True)
    if rows and all(len(row) == 1 for row in rows):
        return [[scene.spot(next(iter(rows[h * size + e]))) for e in range(size)] for h in range(heads)], False
    outputs = [scene.trace.products[index].outputs for index in sources]
    for index, table in zip(sources, support(value, outputs, heads=True), strict=True):
        mixed = [torch.nonzero(part.any(0))[:, 0].tolist() for part in table.reshape(heads, size, -1)]
        if all(len(row) == size for row in mixed):
            return [[scene.spot(Row(index, row)) for row in head] for head in mixed], True
    raise Unexplained("values come neither from one row each, nor from all of a norm's: they are made in another layer")


def _module(first: str, second: str) -> str:
    """The longest module that holds both tensors."""
    words = [
        a
        for a, b in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False)
        )
    ]
    return ".".join(words)


def _output(scene: Scene, call: AttentionCall, layer: str) -> tuple[int, dict[int, int]]:
    """The product that reads an attention's result, and for each of its columns the coordinate of the values."""
    following = range(call.position, min(call.position + 8, len(scene.trace.products)))
    for index in following:
        product = scene.trace.products[index]
        if layer_of(product.name) != layer:
            continue
        (table,) = support(product.inputs, [call.value])
        if table.shape[1] != call.value.shape[-3] * call.value.shape[-1]:
            table = table.reshape(len(table), -1)
        if bool((table.sum(1) == 1).all()) and bool(table.any(0).all()):
            return index, dict(enumerate(table.int().argmax(1).tolist()))
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
        every = scene.origins(tensor, sources, heads=True)
        own = scene.origins(tensor, sources, heads=True, first=True)
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
    gains = _gains(scene, call)
    biases = [next((name for name in side if name.endswith("bias")), None) for side in gains]
    names = [tuple(name for name in side if not name.endswith("bias")) for side in gains]
    if bool(names[0]) != bool(names[1]):
        raise Unexplained("only one of queries and keys has gains of its own")
    axis = scene.disk.places[names[0][0]].shape.numel() != size if scope == "head" and len(names[0]) == 1 else False
    for kind, offset in itertools.product(("rms", "layer"), (0.0, 1.0) if names[0] else (0.0,)):
        norm = QueryKeyNorm(
            kind, scope, epsilon, names[0], names[1], biases[0], biases[1], gain_axis=int(axis), offset=offset
        )
        for rotary in (count for count in (size, size // 2, size // 4, 0) if count % 2 == 0):
            pairings: tuple[Pairing, ...] = ("half", "interleaved")
            for pairing in pairings if rotary else pairings[:1]:
                yield score_parts(query_heads, key_heads, size, rotary, pairing), norm


def _mixed_heads(
    scene: Scene, tensor: Tensor, sources: list[int], heads: int
) -> tuple[list[list[Spot]], Literal["head", "full"]]:
    """The rows of every head in order, where each coordinate comes from all rows of its head, or of all heads."""
    size, stored = tensor.shape[-1], tensor.shape[-3]
    outputs = [scene.trace.products[index].outputs for index in sources]
    for index, table in zip(sources, support(tensor, outputs, heads=True), strict=True):
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


def _gains(scene: Scene, call: AttentionCall) -> tuple[list[str], list[str]]:
    """Tensors that only the queries depend on, and only the keys, other than projections."""
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
        return sorted((name for name in names if owned[name].numel() >= size), key=_natural)

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


# ---------------------------------------------------------------------------------------------------- feed-forward


def feed_forward(scene: Scene, index: int, taken: set[str]) -> Iterator[FeedForward]:
    """Proposals for the hidden units that the product ``index`` reads, the one with the largest groups first.

    ``taken``: weights whose columns belong to an attention. Raises Unexplained when these are no hidden units.
    """
    product = scene.trace.products[index]
    columns = scene.columns(index)
    if any(spot is None for spot in columns):
        raise Unexplained(f"the columns of {product.name} lie in no one place on disk")
    places = [spot for spot in columns if spot is not None]
    if places[0].weight in taken:
        raise Unexplained("read by an attention")
    sources = scene.before(index, layer_of(product.name))
    few = scene.origins(product.inputs[..., :1], sources)  # most products read the stream, and are done with here
    origins = scene.origins(product.inputs, sources) if {len(rows) for rows in few} <= {1, 2} else few
    counts = {len(rows) for rows in origins}
    if len(counts) != 1 or not counts <= {1, 2}:
        raise Unexplained("its input does not come from one or two rows for each coordinate")
    rows = [row for unit in origins for row in unit]
    if len(set(rows)) != len(rows):
        raise Unexplained("its input takes several coordinates from one row")
    order = sorted(range(len(places)), key=lambda unit: places[unit].place)
    down = laid_out([[[places[unit] for unit in order]]])
    sides = [sorted((scene.spot(row) for row in origins[unit]), key=lambda s: (s.weight, s.place)) for unit in order]
    made = [laid_out([[[side[which] for side in sides]]]) for which in range(len(sides[0]))]
    block = FeedForward(_module(made[0].weight, down.weight), len(order), made[0], down)
    if down.offset:
        raise Unexplained(f"{down.weight} reads more than these units")
    if len(made) == 1:
        yield replace(block, activation="relu")
        yield block
        return
    for gate, up in (made, made[::-1]):
        yield replace(block, gate=gate, up=up)
    yield replace(block, gate=made[0], up=made[1], scale_limit="both factors pass through what is not linear")
