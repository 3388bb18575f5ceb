"""Layers that do nothing, in front of others or between them; blocks of one layer told apart into two.

A layer that is added is a copy of its neighbour with other random weights, whose blocks put out exactly zero: their
last weights are zero, or what they read is. Between norms that stand behind blocks (BERT) such a layer normalises once
more what is normalised already; so the norm before it lends gain and bias to its last one, and is 1 and 0 from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import FeedForward, Heads, output_bias
from unmergeable.architecture.layers import Layers, layers_of, stream_of
from unmergeable.architecture.residual import Norm
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.additive import head_places
from unmergeable.randomness import Stream

State = dict[str, Tensor]


def idle_layer(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """One more layer, idle, before one that is drawn; None where the family is not known to bear it."""
    places = [(layers, at, 0) for layers in layers_of(architecture, source.config) for at in range(len(layers))]
    return _with_layer(source, architecture, places, stream)


def split_layer(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """A layer as two: the first blocks in one, the rest in the next, where each then also holds idle ones."""
    places = [
        (layers, at, block)
        for layers in layers_of(architecture, source.config)
        for at in range(len(layers))
        for block in range(1, len(layers.blocks[at]))
    ]
    return _with_layer(source, architecture, places, stream)


def _with_layer(
    source: TensorSource, architecture: Architecture, places: Sequence[tuple[Layers, int, int]], stream: Stream
) -> TensorSource | None:
    """``source`` with a layer more at one of ``places``: a run, a layer of it, and the first block that moves on."""
    possible = [place for place in places if _is_possible(source, architecture, *place)]
    if not possible:
        return None
    layers, at, first = possible[int(stream.child("place").uniform(1)[0] * len(possible))]
    state: State = {}
    for name in source.names:
        number = layers.number_of(name)
        if number is None or number < at:
            state[name] = source.tensor(name)
            continue
        state[layers.renamed(name, number + 1)] = source.tensor(name)
        if number == at:
            state[name] = source.tensor(name)
    blocks = {block.name: block for block in architecture.blocks}
    idle = [(name, at) for name in layers.blocks[at][first:]] + [(name, at + 1) for name in layers.blocks[at][:first]]
    for block, number in idle:
        _make_idle(state, blocks[block], partial(layers.renamed, number=number), stream.child(block))
    _lend_norm(state, architecture, layers, at, first)
    origins = [*range(at + 1), *range(at, len(layers))]
    return MemorySource(state, layers.resized(source.config, origins), source.folder)


def _is_possible(source: TensorSource, architecture: Architecture, layers: Layers, at: int, first: int) -> bool:
    """Whether a layer like this one may stand twice: it is built as the next is, and its norms can be made idle."""
    neighbour = at + 1 if at + 1 < len(layers) else at - 1
    if neighbour < 0 or layers.suffixes(source.names, at) != layers.suffixes(source.names, neighbour):
        return False
    blocks = {block.name: block for block in architecture.blocks}
    stream = stream_of(architecture, _writer(blocks[layers.blocks[at][0]]).weight)
    if stream is None:
        return False
    behind = [norm.then for norm in stream.norms]
    return not any(behind) or (layers.blocks[at][first] in behind and source.config.get("model_type") != "opt")


def _writer(block: Attention | FeedForward) -> Heads:
    return block.output if isinstance(block, Attention) else block.down


def _readers(block: Attention | FeedForward) -> list[tuple[Heads, Tensor]]:
    """What has to be zero for a block to put out nothing, with the places of its rows."""
    if isinstance(block, Attention):
        return [(block.value, head_places(block.value, block.groups, 1, block.value_size).flatten())]
    inputs = [heads for heads in (block.gate, block.up) if heads is not None]
    return [(heads, heads.offset + torch.arange(block.size)) for heads in inputs]


def _make_idle(state: State, block: Attention | FeedForward, place: Callable[[str], str], stream: Stream) -> None:
    """Other weights for the block that is a copy of ``block``, of the same size, and nothing put out."""
    parts = block.parts if isinstance(block, Attention) else ()
    inside = [heads for part in parts for heads in (part.query, part.key)]
    inside += [_writer(block), *(heads for heads, _ in _readers(block))]
    for name in dict.fromkeys(heads.weight for heads in inside):
        tensor = state[place(name)]
        size = float(tensor.double().square().mean().sqrt())
        drawn = torch.from_numpy(stream.child(name).normal(*tensor.shape))
        state[place(name)] = (size * drawn).to(tensor.dtype)
    if stream.child("manner").uniform(1)[0] < 0.5:
        state[place(_writer(block).weight)].zero_()
    else:
        for heads, rows in _readers(block):
            for name, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
                if name is not None:
                    state[place(name)].movedim(axis, 0)[rows] = 0
    bias = place(output_bias(block))
    if bias in state:
        state[bias].zero_()


def _lend_norm(state: State, architecture: Architecture, layers: Layers, at: int, first: int) -> None:
    """Where norms stand behind blocks: those before and among the blocks of the new layer 1 and 0, but the last."""
    blocks = {block.name: block for block in architecture.blocks}
    stream = stream_of(architecture, _writer(blocks[layers.blocks[at][0]]).weight)
    assert stream is not None
    if not any(norm.then for norm in stream.norms):
        return
    feeding = next(index for index, norm in enumerate(stream.norms) if norm.then == layers.blocks[at][first])
    behind = [stream.norms[feeding - first + 1 + block] for block in range(len(layers.blocks[at]))]
    run = [_named(norm, layers, at) for norm in behind[first:]] + [
        _named(norm, layers, at + 1) for norm in behind[:first]
    ]
    before = (stream.norms[feeding].gain, stream.norms[feeding].bias)
    lent = [state[name].clone() for name in before if name is not None]
    for gain, bias in (before, *run):
        state[gain].fill_(1)
        if bias is not None:
            state[bias].zero_()
    for name, tensor in zip((name for name in run[-1] if name is not None), lent, strict=True):
        state[name] = tensor


def _named(norm: Norm, layers: Layers, number: int) -> tuple[str, str | None]:
    """Gain and bias of the same norm in layer ``number``."""
    return layers.renamed(norm.gain, number), None if norm.bias is None else layers.renamed(norm.bias, number)
