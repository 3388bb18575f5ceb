"""A watched network as proposals see it: which row each coordinate comes from, and where heads lie on disk."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmergeable.architecture.blocks import Heads
from unmergeable.derivation.probe import Disk, Source, Spot, output_of, support
from unmergeable.derivation.watch import Trace

MOST_ROWS = 4
"""A hidden unit or a head's coordinate comes from at most this many rows; what comes from more lies behind a mixing."""


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
    _rows: dict[int, list[Spot | None]] = field(default_factory=dict, repr=False)
    _columns: dict[int, list[Spot | None]] = field(default_factory=dict, repr=False)

    def spot(self, row: Row) -> Spot:
        """Where a row lies; raises Unexplained where that is no one place."""
        if row.product not in self._rows:
            self._rows[row.product] = self.disk.rows(self.trace.products[row.product])
        found = self._rows[row.product][row.coordinate]
        if found is None:
            raise Unexplained(f"the rows of {self.trace.products[row.product].name} lie in no one place on disk")
        return found

    def column(self, product: int, column: int) -> Spot:
        """Where a column of a product lies; raises Unexplained where that is no one place."""
        found = self._columns_of(product)[column]
        if found is None:
            raise Unexplained(f"the columns of {self.trace.products[product].name} lie in no one place on disk")
        return found

    def width(self, product: int) -> int:
        return len(self._columns_of(product))

    def _columns_of(self, product: int) -> list[Spot | None]:
        if product not in self._columns:
            self._columns[product] = self.disk.columns(self.trace.products[product])
        return self._columns[product]

    def before(self, position: int, layer: str) -> list[int]:
        """Products of a layer that ran before ``position``."""
        return [index for index in range(position) if layer_of(self.trace.products[index].name) == layer]

    def outputs(self, products: Sequence[int]) -> list[Source]:
        return [output_of(self.trace.products[index]) for index in products]

    def origins(self, target: Source, sources: Sequence[int], *, first_token: bool = False) -> list[set[Row]]:
        """For each coordinate of ``target``, the rows it comes from without being mixed with many others.

        A few coordinates tell which products that is asked of: the way back through all that a layer computed is long.
        """
        last = target.width - 1
        some = sorted({0, last // 3, 2 * last // 3, last})
        tables = support(target, self.outputs(sources), first_token=first_token, only=some)
        near = [index for index, table in zip(sources, tables, strict=True) if bool(_few(table).any())]
        found = self._rows_of(target, near, first_token=first_token)
        return found if found and all(found) else self._rows_of(target, sources, first_token=first_token)

    def _rows_of(self, target: Source, sources: Sequence[int], *, first_token: bool) -> list[set[Row]]:
        found: list[set[Row]] = []
        tables = support(target, self.outputs(sources), first_token=first_token)
        for index, table in zip(sources, tables, strict=True):
            found = found or [set() for _ in range(len(table))]
            for coordinate, row in torch.nonzero(_few(table)).tolist():
                found[coordinate].add(Row(index, row))
        return found

    def origins_of_first(self, target: Source, sources: Sequence[int]) -> set[Row]:
        """The rows that the first coordinate of ``target`` comes from."""
        tables = support(target, self.outputs(sources), only=sorted({0, target.width - 1}))
        return {
            Row(index, row)
            for index, table in zip(sources, tables, strict=True)
            for row in torch.nonzero(_few(table)[0])[:, 0].tolist()
        }


def _few(table: Tensor) -> Tensor:
    """What coordinates come from, where that is little: boolean as ``table`` [coordinates, rows].

    A row that every coordinate comes from is no origin: it weighs all of them.
    """
    own = table & ~table.all(0) if len(table) > 1 else table
    return own & (own.sum(1, keepdim=True) <= MOST_ROWS)


def layer_of(name: str) -> str:
    """The name of the layer a parameter belongs to: up to the first number; empty outside of layers.

    A number right before the last word is that of a step in a sequence, which is no layer.
    """
    match = re.match(r".*?\.\d+(?=\.[^.]+\.)", name)
    return match.group(0) if match else ""


def laid_out(spots: Sequence[Sequence[Sequence[Spot]]]) -> Heads:
    """The heads whose coordinate (group, member, element) lies at ``spots[group][member][element]``."""
    flat = [spot for group in spots for member in group for spot in member]
    first = flat[0]
    if any(
        (spot.weight, spot.axis, spot.bias, spot.slice) != (first.weight, first.axis, first.bias, first.slice)
        for spot in flat
    ):
        raise Unexplained(f"{first.weight}: heads are spread over several tensors")

    def stride(other: Spot | None) -> int:
        return 0 if other is None else other.place - first.place

    groups = stride(spots[1][0][0] if len(spots) > 1 else None)
    members = stride(spots[0][1][0] if len(spots[0]) > 1 else None)
    elements = stride(spots[0][0][1]) if len(spots[0][0]) > 1 else 1
    for g, group in enumerate(spots):
        for m, member in enumerate(group):
            for e, spot in enumerate(member):
                if elements < 1 or spot.place != first.place + g * groups + m * members + e * elements:
                    raise Unexplained(f"{first.weight}: heads lie in no regular order")
    return Heads(first.weight, first.bias, first.axis, first.place, groups, members, elements, first.slice)


def common_module(first: str, second: str) -> str:
    """The longest module that holds both tensors."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    return ".".join(a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
