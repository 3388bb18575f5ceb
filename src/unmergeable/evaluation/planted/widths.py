"""Wider feed-forwards: copies that share what the original puts out, and units that make up for one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.architecture.blocks import FeedForward, Heads, output_bias
from unmergeable.architecture.layers import WIDTHS
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.additive import freedoms_of
from unmergeable.polynomials.layout import activation_of
from unmergeable.randomness import Stream

_BENDS = 12.0
"""Where no activation that is known here bends any more; SiLU is within 1e-4 of a straight line."""

MORE_UNITS = 0.125
"""Share of the hidden units by which feed-forwards become wider."""


State = dict[str, Tensor]

Change = Callable[[State, FeedForward, int, Stream], None]
"""Gives a block so many hidden units more, in place, as a stream draws them."""


def wider_feed_forwards(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every feed-forward with more hidden units, in another order: copies of units drawn, and units without outputs."""
    return _wider(source, architecture, stream, _widen)


def turned_units(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every feed-forward with hidden units turned round, and others that make up for it.

    act(u) = act(-u) + u for every activation that is known here, so that a unit that is turned round lacks a part
    that is linear in what the block reads. Two units give one, act(u) - act(-u); those of a block are mixed by a random
    matrix first, so that none of them points where a unit did. In a gated block act(g) h = act(-g) h + g h, and the
    product is act(h) g - act(-h) g. No unit can be left out, and none is like another.
    """
    return None if activation_of(source.config) is None else _wider(source, architecture, stream, _turn)


def saturated_units(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every feed-forward without gates with hidden units that never bend: what they read is no match for their bias.

    Half of them put out nothing, whatever their output weights. The others put out what they read, and make up for
    units that are turned round, one for each, as in :func:`turned_units`. A norm bounds what a unit can read.
    """
    freedoms = freedoms_of(architecture, source.names)
    norms = {reader.weight: norm for norm in freedoms.norms for reader in norm.readers}
    can = all(
        block.gate is None and block.up.bias is not None and output_bias(block) in source.names
        and block.up.weight in norms
        for block in architecture.feed_forwards
    )  # fmt: skip
    if not can or activation_of(source.config) is None:
        return None

    def saturate(state: State, block: FeedForward, added: int, stream: Stream) -> None:
        norm = norms[block.up.weight]
        gain = state[norm.gain].double() + norm.offset
        bias = norm.bias or norm.scaled_bias
        shift = gain.new_zeros(len(gain)) if bias is None else state[bias].double()
        _saturate(state, block, (gain, shift), added, stream)

    return _wider(source, architecture, stream, saturate)


def _wider(source: TensorSource, architecture: Architecture, stream: Stream, change: Change) -> TensorSource | None:
    """Every feed-forward with more hidden units, by ``change``, and a config that says so; None where they cannot."""
    key = WIDTHS.get(str(source.config.get("model_type")))
    blocks = architecture.feed_forwards
    if key is None or architecture.mixtures or not blocks or not all(_has_own_rows(source, block) for block in blocks):
        return None
    if key == "mlp_ratio":
        ratio = source.config[key]
        added = blocks[0].size // ratio if isinstance(ratio, int) else 0
        changes: dict[str, Any] = {key: ratio + 1}
    else:
        added = max(2, int(MORE_UNITS * blocks[0].size))
        changes = {key: blocks[0].size + added}
    if added == 0 or len({block.size for block in blocks}) > 1:
        return None
    state = {name: source.tensor(name) for name in source.names}
    for block in blocks:
        change(state, block, added, stream.child(block.name))
    return MemorySource(state, {**source.config, **changes}, source.folder)


def _has_own_rows(source: TensorSource, block: FeedForward) -> bool:
    """Whether each of its weights holds its hidden units and nothing else."""
    if block.along:
        return False
    return all(source.spec(heads.weight).shape[heads.axis] == block.size for heads in block.places)


def _widen(state: State, block: FeedForward, added: int, stream: Stream) -> None:
    copied = torch.from_numpy(stream.child("copied").permutations(1, block.size)[0])
    copied = copied.repeat(-(-added // block.size))[:added]
    share = torch.from_numpy(0.2 + 0.6 * stream.child("share").uniform(added))
    is_idle = torch.from_numpy(stream.child("idle").uniform(added)) < 0.5
    order = torch.from_numpy(stream.child("order").permutations(1, block.size + added)[0])
    for heads in (block.gate, block.up):
        for name, axis in stored(heads):
            rows = state[name].movedim(axis, 0)
            more = rows[copied].clone()
            noise = torch.from_numpy(stream.child(name).normal(*more.shape)) * float(
                rows.double().square().mean().sqrt()
            )
            more[is_idle] = noise.to(rows.dtype)[is_idle]
            state[name] = torch.cat([rows, more])[order].movedim(0, axis).contiguous()
    rows = state[block.down.weight].movedim(block.down.axis, 0).double()
    kept = torch.where(is_idle, 0.0, share)
    more = rows[copied] * kept[:, None]
    rows = rows.index_add(0, copied, -more)
    dtype = state[block.down.weight].dtype
    wide = torch.cat([rows, more])[order].movedim(0, block.down.axis)
    state[block.down.weight] = wide.contiguous().to(dtype)


def _turn(state: State, block: FeedForward, added: int, stream: Stream) -> None:
    """Turn half as many units round as are added; one more that puts out nothing where that is an odd number."""
    turned = torch.from_numpy(stream.child("turned").permutations(1, block.size)[0])[: added // 2]
    order = torch.from_numpy(stream.child("order").permutations(1, block.size + added)[0])
    reading = block.up if block.gate is None else block.gate
    mixing = torch.eye(len(turned), dtype=torch.float64)
    if block.gate is None:
        drawn = torch.from_numpy(stream.child("mixing").normal(len(turned), len(turned)))
        mixing = torch.linalg.qr(drawn).Q
    ours = dict(stored(reading))
    others = dict(stored(block.up if block.gate is not None else None))
    for name, axis in {**ours, **others}.items():
        rows = state[name].movedim(axis, 0).double()
        # What is squashed in a pair: the sum that the units lack; of a gated block what the gate was multiplied by.
        part = name if block.gate is None else _counterpart(name, ours, others)
        lent = state[part].movedim(axis, 0).double()[turned]
        if name in ours:
            lent = torch.tensordot(mixing, lent, dims=1)
            rows = rows.index_copy(0, turned, -rows[turned])
        more = torch.cat([lent, -lent if name in ours else lent, rows.new_zeros(added % 2, *rows.shape[1:])])
        wide = torch.cat([rows, more])[order].movedim(0, axis)
        state[f"{name} turned"] = wide.contiguous().to(state[name].dtype)
    for name in (*ours, *others):
        state[name] = state.pop(f"{name} turned")
    weight, axis = block.down.weight, block.down.axis
    rows = state[weight].movedim(axis, 0).double()
    lacking = torch.tensordot(mixing, rows[turned], dims=1)  # an orthogonal matrix is its own inverse's transpose
    more = torch.cat([lacking, -lacking, rows.new_zeros(added % 2, *rows.shape[1:])])
    state[weight] = torch.cat([rows, more])[order].movedim(0, axis).contiguous().to(state[weight].dtype)


def _saturate(state: State, block: FeedForward, norm: tuple[Tensor, Tensor], added: int, stream: Stream) -> None:
    """Half of the ``added`` units asleep, the others awake for good; ``norm``: gain and bias of what is read."""
    turned = torch.from_numpy(stream.child("turned").permutations(1, block.size)[0])[: added // 2]
    order = torch.from_numpy(stream.child("order").permutations(1, block.size + added)[0])
    count, asleep = len(turned), added - len(turned)
    mixing = torch.linalg.qr(torch.from_numpy(stream.child("mixing").normal(count, count))).Q
    weight, down = block.up, block.down
    assert weight.bias is not None
    rows, biases = state[weight.weight].movedim(weight.axis, 0).double(), state[weight.bias].double()
    outputs = state[down.weight].movedim(down.axis, 0).double()
    drawn = rows.square().mean().sqrt() * torch.from_numpy(stream.child("asleep").normal(asleep, rows.shape[1]))
    read, put_out = mixing @ rows[turned], mixing @ outputs[turned]
    gain, shift = norm
    more = torch.cat([read, drawn])
    # No vector that a norm gives is longer than its gains allow.
    reach = (more * gain).norm(dim=1) * more.shape[1] ** 0.5 + (more @ shift).abs() + _BENDS
    reach = reach * (1 + torch.from_numpy(stream.child("reach").uniform(added)))
    own = torch.cat([mixing @ biases[turned], reach.new_zeros(asleep)])
    further = torch.cat([own[:count] + reach[:count] + own[:count].abs(), -reach[count:]])
    idle = outputs.square().mean().sqrt() * torch.from_numpy(stream.child("idle").normal(asleep, outputs.shape[1]))
    bias = output_bias(block)
    left = state[bias].double() - (further - own)[:count] @ put_out
    rows = torch.cat([rows.index_copy(0, turned, -rows[turned]), more])[order]
    biases = torch.cat([biases.index_copy(0, turned, -biases[turned]), further])[order]
    outputs = torch.cat([outputs, put_out, idle])[order]
    for name, tensor in (
        (weight.weight, rows.movedim(0, weight.axis)),
        (weight.bias, biases),
        (down.weight, outputs.movedim(0, down.axis)),
        (bias, left),
    ):
        state[name] = tensor.contiguous().to(state[name].dtype)


def _counterpart(name: str, ours: Mapping[str, int], others: Mapping[str, int]) -> str:
    """The tensor of the other matrix that has this one's part, weight or bias."""
    gates, values = list(ours), list(others)
    return values[gates.index(name)] if name in ours else gates[values.index(name)]


def stored(heads: Heads | None) -> Iterable[tuple[str, int]]:
    """The tensors along which heads or units lie, each with its axis."""
    if heads is None:
        return ()
    return ((heads.weight, heads.axis),) if heads.bias is None else ((heads.weight, heads.axis), (heads.bias, 0))
