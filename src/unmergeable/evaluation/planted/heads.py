"""More heads and larger ones: copies that share what the original puts out, heads told apart by what their values hold,
and coordinates that nothing goes through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import Heads
from unmergeable.architecture.layers import HEAD_COUNTS
from unmergeable.attacks.lossless_pruning.head_forms import HeadShape, are_side_by_side
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.source import TensorSource
from unmergeable.evaluation.planted.widths import stored
from unmergeable.gauge.additive import head_places
from unmergeable.randomness import Stream

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Side:
    """Heads of one projection: ``members`` of ``size`` coordinates in a group."""

    heads: Heads
    members: int
    size: int


def more_heads(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every attention with more key-value heads: copies, with their query heads, that share the output."""
    return _with_copies(source, architecture, stream, are_split=False)


def split_heads(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every attention with more key-value heads: of two with the same scores each lets half of the values through.

    The rest of the values of both is random, and no output reads it.
    """
    return _with_copies(source, architecture, stream, are_split=True)


def _with_copies(
    source: TensorSource, architecture: Architecture, stream: Stream, *, are_split: bool
) -> TensorSource | None:
    keys = HEAD_COUNTS.get(str(source.config.get("model_type")))
    blocks = architecture.attentions
    if keys is None or len({(block.groups, block.members) for block in blocks}) != 1 or not _are_plain(source, blocks):
        return None
    queries, groups, size = keys
    first = blocks[0]
    width = source.config.get("hidden_size", 0)
    # transformers refuses a number of heads that does not divide the width, whatever their size.
    added = next(n for n in range(1, first.groups + 1) if width % (first.members * (first.groups + n)) == 0)
    state = {name: source.tensor(name) for name in source.names}
    tables = {name: heads.bias_tensor for heads in architecture.shared_heads for name in heads.blocks}
    # Where a table of position biases belongs to the heads, all blocks copy the same ones.
    shared = stream.child("copied")
    for block in blocks:
        drawn = shared if tables else stream.child(block.name)
        copied = torch.from_numpy(drawn.permutations(1, block.groups)[0])[:added]
        _add_heads(state, block, copied, stream.child(block.name))
        if are_split:
            wider = replace(block, groups=block.groups + added)
            _split_values(state, wider, copied, stream.child(f"{block.name} values"))
    for table in set(tables.values()):
        copied = torch.from_numpy(shared.permutations(1, first.groups)[0])[:added]
        state[table] = torch.cat([state[table], state[table][:, copied]], dim=1).contiguous()
    changes = {queries: first.members * (first.groups + added), size: first.value_size}
    if groups is not None:
        changes[groups] = first.groups + added
    return MemorySource(state, {**source.config, **changes}, source.folder)


def _split_values(state: State, block: Attention, copied: Tensor, stream: Stream) -> None:
    """Between a head and its copy, the last ones: what both put out together, half by each."""
    size, half = block.value_size, block.value_size // 2
    value, output = block.value, block.output
    values = state[value.weight].movedim(value.axis, 0).double()
    biases = None if value.bias is None else state[value.bias].double()
    columns = state[output.weight].movedim(output.axis, 0).double()
    of_values = head_places(value, block.groups, 1, size)[:, 0]
    of_output = head_places(output, block.groups, block.members, size)
    copies = range(block.groups - len(copied), block.groups)
    for head, copy in zip(copied.tolist(), copies, strict=True):
        drawn = stream.child(str(head))
        basis = torch.linalg.qr(torch.from_numpy(drawn.normal(size, size))).Q
        turned = basis @ values[of_values[head]]
        together = [basis @ (columns[of_output[head, m]] + columns[of_output[copy, m]]) for m in range(block.members)]
        shift = None if biases is None else basis @ biases[of_values[head]]
        for place, is_own in ((head, torch.arange(size) < half), (copy, torch.arange(size) >= half)):
            noise = turned.square().mean().sqrt() * torch.from_numpy(drawn.child(str(place)).normal(*turned.shape))
            values[of_values[place]] = torch.where(is_own[:, None], turned, noise)
            for member in range(block.members):
                columns[of_output[place, member]] = torch.where(is_own[:, None], together[member], 0.0)
            if biases is not None and shift is not None:
                biases[of_values[place]] = shift
    state[value.weight] = values.movedim(0, value.axis).contiguous().to(state[value.weight].dtype)
    state[output.weight] = columns.movedim(0, output.axis).contiguous().to(state[output.weight].dtype)
    if value.bias is not None and biases is not None:
        state[value.bias] = biases.to(state[value.bias].dtype)


def wider_heads(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every head larger: coordinates that queries have and keys do not, or the other way round, and values unread.

    Where positions turn pairs of coordinates there are twice as many, and the old ones those that turn as before.
    """
    keys = HEAD_COUNTS.get(str(source.config.get("model_type")))
    blocks = architecture.attentions
    plain = keys is not None and len({(block.groups, block.members) for block in blocks}) == 1
    if keys is None or not plain or not _are_plain(source, blocks) or any(block.norm is not None for block in blocks):
        return None
    old = HeadShape.of(blocks[0], source.config)
    rotary = next((part.rotary for block in blocks for part in block.parts if part.rotary), None)
    if rotary is not None and (rotary != "half" or old.frequencies() is None):
        return None
    wider = replace(old, size=2 * old.size if rotary else old.size + max(2, old.size // 4))
    kept = torch.arange(old.size)
    if rotary is not None:
        kept = torch.cat([torch.arange(0, old.size, 2), old.size + torch.arange(0, old.size, 2)])
    state = {name: source.tensor(name) for name in source.names}
    for block in blocks:
        _widen_heads(state, block, wider, kept, old.scale / wider.scale, stream.child(block.name))
    changes: dict[str, Any] = {keys[2]: wider.size}
    return MemorySource(state, {**source.config, **changes}, source.folder)


def _widen_heads(state: State, block: Attention, wider: HeadShape, kept: Tensor, scale: float, stream: Stream) -> None:
    (part,) = block.parts
    of_queries = torch.from_numpy(stream.child("side").uniform(wider.size)) < 0.5
    if part.rotary is not None:  # both of a pair
        of_queries = of_queries[: wider.size // 2].repeat(2)
    nothing = torch.zeros(wider.size, dtype=torch.bool)
    for heads, members, factor, is_random in (
        (part.query, block.members, scale, of_queries),
        (part.key, 1, 1.0, ~of_queries),
        (block.value, 1, 1.0, ~nothing),
        (block.output, block.members, 1.0, nothing),
    ):
        places = head_places(heads, block.groups, members, block.value_size)
        for name, axis in stored(heads):
            rows = state[name].movedim(axis, 0).double()[places]
            wide = rows.new_zeros(*rows.shape[:2], wider.size, *rows.shape[3:])
            noise = torch.from_numpy(stream.child(name).normal(*wide.shape)) * rows.square().mean().sqrt()
            wide[:, :, is_random] = noise[:, :, is_random]
            wide[:, :, kept] = factor * rows
            flat = wide.flatten(0, 2).movedim(0, axis).contiguous()
            state[name] = flat.to(state[name].dtype)


def _are_plain(source: TensorSource, blocks: Iterable[Attention]) -> bool:
    """Whether each projection holds its heads side by side and nothing else, and norms do not tell heads apart."""
    return all(
        are_side_by_side(block, lambda heads: source.spec(heads.weight).shape[heads.axis])
        and len(block.parts) == 1
        and not block.joined
        and (block.norm is None or not (block.norm.scope == "full" or block.norm.gain_axis))
        for block in blocks
    )


def _add_heads(state: dict[str, Tensor], block: Attention, copied: Tensor, stream: Stream) -> None:
    (part,) = block.parts
    size, members = block.value_size, block.members
    for side in (_Side(part.query, members, size), _Side(part.key, 1, size), _Side(block.value, 1, size)):
        places = head_places(side.heads, block.groups, side.members, size)[copied].flatten()
        for name, axis in stored(side.heads):
            rows = state[name].movedim(axis, 0)
            state[name] = torch.cat([rows, rows[places]]).movedim(0, axis).contiguous()
    weight, axis = block.output.weight, block.output.axis
    places = head_places(block.output, block.groups, members, size)[copied].flatten()
    rows = state[weight].movedim(axis, 0).double()
    share = torch.from_numpy(0.2 + 0.6 * stream.child("share").uniform(len(copied))).repeat_interleave(members * size)
    more = rows[places] * share[:, None]
    wide = torch.cat([rows.index_add(0, places, -more), more]).movedim(0, axis)
    state[weight] = wide.contiguous().to(state[weight].dtype)
