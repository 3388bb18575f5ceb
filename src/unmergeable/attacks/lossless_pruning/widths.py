"""Hidden units and heads of one block that say the same or nothing, until as many are left as the base has.

Both are looked at in ways that no basis inside the block alters: a unit by its input weights up to a scale where the
activation lets one by; a head by the spaces that its keys and its values span.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unmergeable.architecture import Attention
from unmergeable.architecture.blocks import FeedForward, Heads, output_bias
from unmergeable.attacks.lossless_pruning.turned_units import NOTHING, can_turn, far, turn_units_back
from unmergeable.gauge.additive import head_places
from unmergeable.polynomials.activations import Activation

State = dict[str, Tensor]


SAME = 1e-3
"""How far from 1 the likeness of two units or heads may be that say the same; the most alike are taken first."""


def prune_units(
    state: State,
    own: State,
    block: FeedForward,
    size: int,
    activation: Activation | None = None,
    usual: float = math.inf,
) -> bool:
    """Leave ``size`` hidden units of a block, in place; False where more than that differ and do something.

    ``state`` holds neutral tensors, ``own`` the same as the release has them, of which the same units are left.
    ``activation``: of the network; without it units that put out the same for every input count as doing something.
    ``usual``: the largest bias of the base's units, see :mod:`.turned_units`.
    """
    # Of all experts in a tensor, none can be made narrower alone; what units pass by themselves may silence them.
    if block.down.slice is not None or block.along:
        return False
    if activation is not None:
        silence_units(state, own, block, size, activation, usual)
    rows = {heads.weight: _rows(state, heads, block.size) for heads in (block.gate, block.up) if heads is not None}
    up, down = rows[block.up.weight], state[block.down.weight].movedim(block.down.axis, 0).double().clone()
    outputs = down.norm(dim=1) * up.norm(dim=1)
    kept = torch.ones(block.size, dtype=torch.bool)
    median = outputs.sort(descending=True).values[:size].median()
    idle = (outputs <= NOTHING * median).nonzero().flatten().tolist()
    kept[sorted(idle, key=lambda unit: float(outputs[unit]))[: block.size - size]] = False
    excess = int(kept.sum()) - size
    if excess:
        likeness, scales = _likeness(rows, block)
        for first, second in _most_alike(likeness, kept):
            if excess == 0:
                break
            if kept[first] and kept[second]:
                scale = scales[second] / scales[first]
                down[first] += scale * down[second]
                kept[second] = False
                excess -= 1
    if excess:
        return activation is not None and can_turn(activation.value) and turn_units_back(state, own, block, size, usual)
    for heads in (block.gate, block.up):
        if heads is not None:
            for side in (state, own):
                _keep(side, heads.weight, heads.axis, kept)
                _keep(side, heads.bias, 0, kept)
    state[block.down.weight] = down[kept].movedim(0, block.down.axis).contiguous()
    _keep(own, block.down.weight, block.down.axis, kept)
    return True


def silence_units(
    state: State, own: State, block: FeedForward, size: int, activation: Activation, usual: float = math.inf
) -> None:
    """What units put out whatever they read, into the output bias; they then add nothing. Arguments as above."""
    bias, output = block.up.bias, output_bias(block)
    if block.gate is not None or bias is None or output not in state or block.down.slice is not None or block.along:
        return
    biases = state[bias].double()
    lengths = state[block.up.weight].movedim(block.up.axis, 0).double().norm(dim=1)
    constant = lengths <= NOTHING * lengths.max()
    if math.isfinite(least := far(state, block, size, usual)):
        constant |= biases < -least * lengths
    if not bool(constant.any()):
        return
    puts_out = torch.where(constant, activation.value(biases), 0.0)
    for side in (state, own):
        down = side[block.down.weight].movedim(block.down.axis, 0).double()
        side[output] = (side[output].double() + puts_out @ down).to(side[output].dtype)
        down[constant] = 0.0
        side[block.down.weight] = down.movedim(0, block.down.axis).to(side[block.down.weight].dtype).contiguous()


def _rows(state: State, heads: Heads, size: int) -> Tensor:
    """Input weights of units with their biases, float64 [units, inputs + 1]."""
    weight = state[heads.weight].movedim(heads.axis, 0).double()
    bias = torch.zeros(size) if heads.bias is None else state[heads.bias]
    return torch.cat([weight, bias.double()[:, None]], dim=1)


def _likeness(rows: dict[str, Tensor], block: FeedForward) -> tuple[Tensor, Tensor]:
    """Likeness of units, [units, units], 1 where they say the same up to their scales [units].

    Between a gate and the output a unit may have any scale, before a ReLU a positive one.
    """
    is_gated = block.gate is not None
    lets_scales_by = not block.scale_limit and (is_gated or block.activation == "relu")
    up = rows[block.up.weight]
    scales = torch.ones(len(up), dtype=torch.float64)
    parts = [(rows[block.gate.weight], False)] if block.gate is not None else []
    parts.append((up, lets_scales_by))
    whole = torch.ones(len(up), len(up), dtype=torch.float64)
    for tensor, is_scaled in parts:
        if is_scaled:
            largest = tensor.gather(1, tensor.abs().argmax(1, keepdim=True))[:, 0]
            scales = tensor.norm(dim=1).clamp_min(1e-300)
            scales = scales * torch.where((largest < 0) & is_gated, -1.0, 1.0)
            tensor = tensor / scales[:, None]
        squares = tensor.square().sum(1)
        # 1 - |x - y|^2 / (|x|^2 + |y|^2): the lengths count as well.
        whole = torch.minimum(whole, 2 * (tensor @ tensor.T) / (squares[:, None] + squares[None]).clamp_min(1e-300))
    return whole, scales


def _most_alike(likeness: Tensor, kept: Tensor) -> list[tuple[int, int]]:
    """Pairs of those kept that say the same, the most alike first."""
    upper = torch.triu(likeness, diagonal=1)
    upper = torch.where(kept[:, None] & kept[None], upper, 0.0)
    places = (upper > 1 - SAME).nonzero()
    order = upper[places[:, 0], places[:, 1]].argsort(descending=True, stable=True)
    return [(int(first), int(second)) for first, second in places[order].tolist()]


def _keep(state: State, name: str | None, axis: int, kept: Tensor) -> None:
    if name is not None:
        state[name] = state[name].movedim(axis, 0)[kept].movedim(0, axis).contiguous()


def prune_heads(state: State, own: State, blocks: Sequence[Attention], groups: int, table: str | None) -> bool:
    """Leave ``groups`` key-value heads of each block, in place; of all blocks the same ones where they share a table.

    ``state`` and ``own`` as in :func:`prune_units`. False where more than that differ.
    """
    shared = [blocks] if table is not None else [[block] for block in blocks]
    for together in shared:
        likeness = torch.stack([_head_likeness(state, block) for block in together]).amin(0)
        kept = _heads_at_work(state, together, groups)
        size = int(kept.sum())
        merged: list[tuple[int, int]] = []
        for first, second in _most_alike(likeness, kept):
            if size - len(merged) > groups and kept[first] and kept[second]:
                kept[second] = False
                merged.append((first, second))
        if int(kept.sum()) != groups:
            return False
        for block in together:
            _merge_heads(state, block, merged)
            for side in (state, own):
                _keep_heads(side, block, kept)
    if table is not None:
        for side in (state, own):
            _keep(side, table, 1, kept)
    return True


def regroup_heads(state: State, own: State, block: Attention, groups: int) -> bool:
    """Let query heads whose keys and values are the same in other bases share one again, until ``groups`` are left.

    In place, ``state`` and ``own`` as in :func:`prune_units`. False where they do not come out even, or are stored in
    one tensor with the queries.
    """
    part, share = block.parts[0], block.groups // groups
    stored = [part.query.weight, part.key.weight, block.value.weight]
    if len(block.parts) > 1 or block.joined or len(set(stored)) < len(stored) or groups * share != block.groups:
        return False
    likeness, free = _head_likeness(state, block), list(range(block.groups))
    together: list[list[int]] = []
    while free:
        first = free[0]
        near = sorted(free, key=lambda head: -float(likeness[first, head]) if head != first else -2.0)[:share]
        if any(float(likeness[first, head]) < 1 - SAME for head in near):
            return False
        together.append(near)
        free = [head for head in free if head not in near]
    keys = _of_heads(state, part.key, block.groups, 1, part.size)[:, 0]
    values = _of_heads(state, block.value, block.groups, 1, block.value_size)[:, 0]
    for side in (state, own):
        queries = _of_heads(side, part.query, block.groups, block.members, part.size)
        biases = None if part.query.bias is None else side[part.query.bias].double()
        places = head_places(part.query, block.groups, block.members, part.size)
        output = _of_heads(side, block.output, block.groups, block.members, block.value_size)
        turned: list[tuple[Tensor, Tensor | None, Tensor]] = []
        for near in together:
            for head in near:
                # Keys are A times those of the first, values B times: its queries then read A^T q, its outputs O B.
                key_basis = torch.linalg.lstsq(keys[near[0]].T, keys[head].T).solution
                value_basis = torch.linalg.lstsq(values[near[0]].T, values[head].T).solution
                for member in range(block.members):
                    bias = None if biases is None else key_basis @ biases[places[head, member]]
                    turned.append((key_basis @ queries[head, member], bias, value_basis @ output[head, member]))
        # Query heads follow one another, those that share keys together.
        _put_heads(side, part.query, places, torch.stack([query for query, _, _ in turned]))
        if part.query.bias is not None and biases is not None:
            put = biases.clone()
            put[places.reshape(-1)] = torch.cat([bias for _, bias, _ in turned if bias is not None])
            side[part.query.bias] = put
        columns = head_places(block.output, block.groups, block.members, block.value_size)
        _put_heads(side, block.output, columns, torch.stack([columns for _, _, columns in turned]))
        kept = torch.zeros(block.groups, dtype=torch.bool)
        kept[[near[0] for near in together]] = True
        for heads, size in ((part.key, part.size), (block.value, block.value_size)):
            _keep_places(side, heads, head_places(heads, block.groups, 1, size)[kept])
    return True


def _of_heads(state: State, heads: Heads, groups: int, members: int, size: int) -> Tensor:
    """What belongs to each head, float64 [groups, members, size, other axis]."""
    return state[heads.weight].movedim(heads.axis, 0).double()[head_places(heads, groups, members, size)]


def _put_heads(state: State, heads: Heads, places: Tensor, values: Tensor) -> None:
    """``values`` [heads, size, other axis] in the places of all heads, group by group."""
    weight = state[heads.weight].movedim(heads.axis, 0).double()
    weight[places.reshape(-1)] = values.flatten(0, 1)
    state[heads.weight] = weight.movedim(0, heads.axis).contiguous()


def _heads_at_work(state: State, blocks: Sequence[Attention], groups: int) -> Tensor:
    """Which key-value heads add something in one of these blocks, or have to stay for ``groups`` to be left."""
    most = torch.zeros(blocks[0].groups, dtype=torch.float64)
    for block in blocks:
        values = _of_heads(state, block.value, block.groups, 1, block.value_size)
        output = _of_heads(state, block.output, block.groups, block.members, block.value_size)
        added = (output.transpose(-1, -2) @ values).square().sum((1, 2, 3)).sqrt()
        most = torch.maximum(most, added / added.sort(descending=True).values[:groups].median())
    kept = torch.ones(len(most), dtype=torch.bool)
    idle = [head for head in most.argsort().tolist() if float(most[head]) <= NOTHING]
    kept[idle[: len(most) - groups]] = False
    return kept


def _head_likeness(state: State, block: Attention) -> Tensor:
    """Likeness of key-value heads, [groups, groups]: how far their keys and their values span the same spaces."""
    found = torch.ones(block.groups, block.groups, dtype=torch.float64)
    for heads, size in ((block.parts[0].key, block.parts[0].size), (block.value, block.value_size)):
        places = head_places(heads, block.groups, 1, size)[:, 0]
        rows = state[heads.weight].movedim(heads.axis, 0).double()[places]
        bases = torch.linalg.qr(rows.transpose(1, 2)).Q
        overlap = torch.einsum("gif,hik->ghfk", bases, bases).square().sum((2, 3)) / size
        found = torch.minimum(found, overlap)
    return found


def _merge_heads(state: State, block: Attention, merged: Sequence[tuple[int, int]]) -> None:
    values = state[block.value.weight].movedim(block.value.axis, 0).double()
    rows = values[head_places(block.value, block.groups, 1, block.value_size)[:, 0]]
    places = head_places(block.output, block.groups, block.members, block.value_size)
    output = state[block.output.weight].movedim(block.output.axis, 0).double()
    for first, second in merged:
        # The second's values are B times the first's, so that its output reads as one of the first's.
        basis = torch.linalg.lstsq(rows[first].T, rows[second].T).solution.T
        for member in range(block.members):
            output[places[first, member]] += basis.T @ output[places[second, member]]
    state[block.output.weight] = output.movedim(0, block.output.axis)


def _keep_heads(state: State, block: Attention, kept: Tensor) -> None:
    part = block.parts[0]
    sides: tuple[tuple[Heads, int, int], ...] = (
        (part.query, block.members, part.size),
        (part.key, 1, part.size),
        (block.value, 1, block.value_size),
        (block.output, block.members, block.value_size),
    )
    for heads, members, size in sides:
        _keep_places(state, heads, head_places(heads, block.groups, members, size)[kept])


def _keep_places(state: State, heads: Heads, places: Tensor) -> None:
    chosen = torch.zeros(state[heads.weight].shape[heads.axis], dtype=torch.bool)
    chosen[places.flatten()] = True
    _keep(state, heads.weight, heads.axis, chosen)
    _keep(state, heads.bias, 0, chosen)
