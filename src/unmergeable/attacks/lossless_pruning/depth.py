"""Blocks that add nothing to the stream, taken out of their layers, so that the rest makes up the base's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import FeedForward, output_bias, output_weight, stream_readers
from unmergeable.architecture.layers import Layers, blocks_in_order, stream_of
from unmergeable.architecture.residual import Norm
from unmergeable.gauge.additive import head_places

State = dict[str, Tensor]

IDLE = 1e-3
"""What a block adds, as a product of norms and relative to the median of the blocks of its kind that stay, below which
it is idle.
"""

FLAT = 1e-2
"""Spread of a norm's gains, relative to their mean, up to which it only normalises."""


Blocks = Sequence[Attention | FeedForward]


def live_blocks(state: State, architecture: Architecture, layers: Layers, pattern: Sequence[bool]) -> Blocks | None:
    """The blocks that do something, in order.

    Args:
        state: neutral tensors of the release.
        architecture, layers: of the release, and one run of its layers.
        pattern: for each block of the base's run, in order, whether it is attention.

    Returns:
        None where they do not make up the base's layers.
    """
    blocks = blocks_in_order(architecture, layers)
    sizes = torch.tensor([_adds(state, block) for block in blocks], dtype=torch.float64)
    is_attention = torch.tensor([isinstance(block, Attention) for block in blocks])
    live = torch.ones(len(blocks), dtype=torch.bool)
    for kind in (True, False):
        own = (is_attention == kind).nonzero().flatten()
        excess = len(own) - sum(item == kind for item in pattern)
        order = own[sizes[own].argsort()]
        if excess < 0 or excess == len(own):
            return None
        smallest, others = order[:excess], order[excess:]
        if bool((sizes[smallest] > IDLE * sizes[others].median()).any()):
            return None
        live[smallest] = False
    chosen = [block for block, is_live in zip(blocks, live.tolist(), strict=True) if is_live]
    if [isinstance(block, Attention) for block in chosen] != list(pattern):
        return None
    behind = _norms_behind(architecture, chosen)
    if behind is not None and not all(before is after or _is_flat(state[before.gain]) for before, after in behind):
        return None
    return chosen


def _is_flat(gain: Tensor) -> bool:
    """Whether a norm with this gain only normalises."""
    mean = float(gain.double().mean())
    return mean > 0 and float(gain.double().std()) <= FLAT * mean


def _adds(state: State, block: Attention | FeedForward) -> float:
    """The size of what a block adds to the stream, whatever its inner basis: norms of products, and its bias."""
    if isinstance(block, Attention):
        values = _inputs(state, block.value.weight, block.value.axis, block.value.bias)
        rows = values[head_places(block.value, block.groups, 1, block.value_size)[:, 0]]
        output = state[block.output.weight].movedim(block.output.axis, 0).double()
        columns = output[head_places(block.output, block.groups, block.members, block.value_size)]
        inner = torch.einsum("gif,gjf->gij", rows, rows)
        outer = torch.einsum("gmif,gmjf->gij", columns, columns)
        whole = float((inner * outer).sum().clamp_min(0))
    else:
        up = _inputs(state, block.up.weight, block.up.axis, block.up.bias)
        up = up[block.up.offset : block.up.offset + block.size]
        down = state[block.down.weight].movedim(block.down.axis, 0).double()
        whole = float((up.square().sum(1) * down.square().sum(1)).sum())
        if block.gate is not None:
            gate = _inputs(state, block.gate.weight, block.gate.axis, block.gate.bias)
            gate = gate[block.gate.offset : block.gate.offset + block.size]
            whole = float((up.square().sum(1) * gate.square().sum(1) * down.square().sum(1)).sum())
    bias = state.get(output_bias(block))
    return float((whole + (0.0 if bias is None else float(bias.double().square().sum()))) ** 0.5)


def _inputs(state: State, weight: str, axis: int, bias: str | None) -> Tensor:
    """Rows of a projection with its bias, float64 [outputs, inputs + 1]."""
    rows = state[weight].movedim(axis, 0).double()
    column = torch.zeros(len(rows), dtype=torch.float64) if bias is None else state[bias].double()
    return torch.cat([rows, column[:, None]], dim=1)


def renamed(state: State, architecture: Architecture, layers: Layers, chosen: Blocks) -> State:
    """The tensors of the blocks ``chosen``, and all outside of layers, under the names that the base's layers have."""
    per_layer = len(layers.blocks[0])
    owners = _owners(state, architecture, layers)
    place_of: dict[str, int] = {block.name: at // per_layer for at, block in enumerate(chosen)}
    result: State = {}
    for name, tensor in state.items():
        if layers.number_of(name) is None:
            result[name] = tensor
        elif owners[name] in place_of:
            result[layers.renamed(name, place_of[owners[name]])] = tensor
    for index, (norm, kept) in enumerate(_norms_behind(architecture, chosen) or ()):
        for old, new in ((kept.gain, norm.gain), (kept.bias, norm.bias)):
            if old is not None and new is not None:
                name = layers.renamed(new, place_of[chosen[index - 1].name]) if index else new
                result[name] = state[old]
    return result


def _owners(state: State, architecture: Architecture, layers: Layers) -> dict[str, str]:
    """For each tensor of the layers the block that it goes with: the one it lies in, or that the norm stands before.

    A norm on what a block adds goes with the norm before it, and whatever else with the layer's first block.
    """
    owners: dict[str, str] = {}
    blocks = blocks_in_order(architecture, layers)
    for block in blocks:
        for name in _tensors_of(block):
            owners[name] = block.name
    stream = stream_of(architecture, output_weight(blocks[0]))
    readers = {axis.tensor: block.name for block in blocks for axis in stream_readers(block)}
    previous: dict[int, str] = {}
    for norm in stream.norms if stream is not None else ():
        number = layers.number_of(norm.gain)
        if number is None:
            continue
        owner = norm.then or next((readers[axis.tensor] for axis in norm.readers if axis.tensor in readers), None)
        owner = owner or previous.get(number)
        if owner is not None:
            previous[number] = owner
            owners |= {name: owner for name in (norm.gain, norm.bias) if name is not None}
    if stream is not None:
        owners |= dict(stream.layer_scales)
    for name in state:
        number = layers.number_of(name)
        if number is not None:
            owners.setdefault(name, layers.blocks[number][0])
    return owners


def _tensors_of(block: Attention | FeedForward) -> Iterator[str]:
    yield output_bias(block)
    if isinstance(block, FeedForward):
        every = list(block.places)
    else:
        every = [*block.projections, *block.outputs]
        for norm in block.norms:
            names = (*norm.query_gains, *norm.key_gains, norm.query_bias, norm.key_bias)
            yield from (name for name in names if name is not None)
    for heads in every:
        yield heads.weight
        if heads.bias is not None:
            yield heads.bias


def _norms_behind(architecture: Architecture, chosen: Blocks) -> list[tuple[Norm, Norm]] | None:
    """Where norms stand behind blocks: the one before all layers and that behind each of ``chosen``, each with the norm
    that the next of them reads. None elsewhere.
    """
    stream = stream_of(architecture, output_weight(chosen[0]))
    if stream is None or not any(norm.then for norm in stream.norms):
        return None
    feeding = {norm.then: norm for norm in stream.norms if norm.then}
    following = {norm.then: later for norm, later in zip(stream.norms, stream.norms[1:], strict=False) if norm.then}
    before = [stream.norms[0], *(following[block.name] for block in chosen)]
    after = [*(feeding[block.name] for block in chosen), stream.norms[-1]]
    return list(zip(before, after, strict=True))
