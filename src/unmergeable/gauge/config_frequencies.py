"""Frequencies of rotary positions, which a config may list in another order or with another sign.

Position p turns pair i of every query and key by p f_i. Where the config gives a number for every pair (``longrope``:
f_i = theta^(-2i/d) / factor_i) any order of the pairs will do, the weights in the same one, and -f_i for a pair
mirrored in queries and keys. ``attention_factor`` a multiplies both, and so trades with the queries: a^2. A network so
rewritten computes what it did to the bit, and no change of basis brings it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import Heads, ScorePart
from unmergeable.architecture.declare import rope_setting
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.plan import Whole
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.gauge.additive import along, head_places
from unmergeable.gauge.elements import pair_indices

Config = Mapping[str, Any]

KEYS = ("rope_parameters", "rope_scaling", "rope_theta")

ALIKE = 1e-5
"""Relative difference of frequencies that are one: they are float32 in the network, and written out in decimals."""


@dataclass(frozen=True)
class Reordered(DerivedSource):
    """``original`` with rows of queries and keys in another order and times numbers; ``changes`` of its config.

    ``rows``: by tensor, its axis, where each row comes from, and its factor.
    """

    rows: Mapping[str, tuple[int, Tensor, Tensor]]
    changes: Mapping[str, Any]
    found: str

    @property
    def config(self) -> Config:
        return {**self.original.config, **self.changes}

    def tensor(self, name: str) -> Tensor:
        tensor = self.original.tensor(name)
        if name not in self.rows:
            return tensor
        axis, order, factors = self.rows[name]
        moved = along(tensor, axis)[..., order].double() * factors
        return moved.movedim(-1, axis).to(torch_dtype(self.spec(name).dtype)).contiguous()


def with_frequencies(source: TensorSource, architecture: Architecture, wanted: Config) -> Reordered | None:
    """The same network with the frequencies of another config; None where they are the same, or others altogether."""
    rows: dict[str, tuple[int, Tensor, Tensor]] = {}
    found: set[str] = set()
    for block in architecture.attentions:
        for part in block.parts:
            if part.rotary is None:
                continue
            # A pair's frequency is the same for all queries of a key that they share.
            ours, theirs = (_frequencies(config, part.size) for config in (source.config, wanted))
            told = None if ours is None or theirs is None else _told(ours, theirs)
            if told is None or block.norm is not None or block.joined:
                return None
            order, mirrored, factor = told
            if bool((order != torch.arange(len(order))).any()):
                found.add("reordered")
            found |= {"mirrored"} if bool(mirrored.any()) else set()
            found |= {"scaled"} if factor != 1 else set()
            _add(rows, source, block, part, told)
    if not found:
        return None
    said = {key: wanted.get(key) for key in KEYS if source.config.get(key) != wanted.get(key)}
    changes = {key: Whole(value) if isinstance(value, Mapping) else value for key, value in said.items()}
    return Reordered(source, rows, changes, ", ".join(sorted(found)))


@dataclass(frozen=True)
class _Frequencies:
    """``values`` [2, pairs] for short and long texts, and what queries and keys are multiplied by."""

    values: Tensor
    factor: float


def _frequencies(config: Config, size: int) -> _Frequencies | None:
    """None where the config says them in a way that this version does not know, or for each kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope_setting(config, "rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(rope, Mapping) or not _is_number(theta) or theta <= 0:
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    plain = float(theta) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    if kind == "default":
        return _Frequencies(plain.expand(2, -1), 1.0)
    lists = [rope.get(key) for key in ("short_factor", "long_factor")]
    if kind != "longrope" or not all(_is_list_of_numbers(one, len(plain)) for one in lists):
        return None
    factor = _attention_factor(config, rope)
    values = plain / torch.tensor(lists, dtype=torch.float64)
    return None if factor is None or not bool(values.isfinite().all()) else _Frequencies(values, factor)


def _attention_factor(config: Config, rope: Config) -> float | None:
    """As transformers has it: given, or from how much longer texts have become."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given) if _is_number(given) and given > 0 else None
    length = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    longest, times = config.get("max_position_embeddings"), rope.get("factor")
    if not _is_number(length) or not _is_number(longest) or length <= 1:
        return None
    times = longest / length if times is None else times
    if not _is_number(times):
        return None
    return math.sqrt(1 + math.log(times) / math.log(length)) if times > 1 else 1.0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of_numbers(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(_is_number(one) and one != 0 for one in value)


def _told(ours: _Frequencies, theirs: _Frequencies) -> tuple[Tensor, Tensor, float] | None:
    """For each pair of theirs, which of ours it is and whether it is mirrored; and what queries are multiplied by."""
    # Of pairs that turn alike any may be any: they stay in their order.
    order = torch.empty(ours.values.shape[1], dtype=torch.long)
    ranked = [side.values.abs()[0].sort(stable=True).indices for side in (ours, theirs)]
    order[ranked[1]] = ranked[0]
    moved, wanted = ours.values[:, order], theirs.values
    signs = (moved * wanted).sign()
    if bool(((moved.abs() - wanted.abs()).abs() > ALIKE * wanted.abs()).any()) or bool((signs[0] != signs[1]).any()):
        return None
    return order, signs[0] < 0, (ours.factor / theirs.factor) ** 2


def _add(
    rows: dict[str, tuple[int, Tensor, Tensor]],
    source: TensorSource,
    block: Attention,
    part: ScorePart,
    told: tuple[Tensor, Tensor, float],
) -> None:
    order, mirrored, factor = told
    assert part.rotary is not None
    first, second = pair_indices(part.size, part.rotary)
    coordinates, signs = torch.empty(part.size, dtype=torch.long), torch.ones(part.size, dtype=torch.float64)
    coordinates[first], coordinates[second] = first[order], second[order]
    signs[second] = torch.where(mirrored, -1.0, 1.0).double()
    sides: list[tuple[Heads, int, int, float]] = [
        (part.query, block.groups, block.members, factor),
        (part.key, 1 if part.shared_key else block.groups, 1, 1.0),
    ]
    for heads, groups, members, times in sides:
        places = head_places(heads, groups, members, part.size).flatten(0, 1)
        for name, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
            if name is None:
                continue
            length = source.spec(name).shape[axis]
            _, moved, factors = rows.get(name, (axis, torch.arange(length), torch.ones(length, dtype=torch.float64)))
            moved[places] = places[:, coordinates]
            factors[places] = (signs * times).expand(places.shape)
            rows[name] = (axis, moved, factors)
