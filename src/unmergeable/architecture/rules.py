"""From what a family declares to spaces and legs: one rule per kind of block.

Which group survives rotary positions, a norm on queries and keys, or an activation is written here once, for all
families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from unmergeable.architecture.blocks import (
    Attention,
    FeedForward,
    Heads,
    Mixture,
    QueryKeyNorm,
    ScorePart,
    SharedHeads,
    ValueGroup,
)
from unmergeable.architecture.collector import Collector
from unmergeable.architecture.residual import Residual, residual_rules
from unmergeable.architecture.symmetry import GroupKind, Leg, Pairing, Space, Stack, SymmetryMap, Variance


def symmetry_map(
    blocks: Iterable[Attention | FeedForward],
    shared: Iterable[SharedHeads] = (),
    mixtures: Iterable[Mixture] = (),
    residuals: Iterable[Residual] = (),
    missing: Mapping[str, str] | None = None,
) -> SymmetryMap:
    """Derive every space and leg from the declared blocks and streams."""
    collector = Collector()
    shared = tuple(shared)
    shared_by_block = {block: group for group in shared for block in group.blocks}
    shared_spaces: dict[str, Space] = {}
    for block in blocks:
        if isinstance(block, FeedForward):
            _feed_forward_rules(collector, block)
            continue
        _score_rules(collector, block)
        _value_rules(collector, block)
        _head_rules(collector, block, shared_by_block.get(block.name), shared_spaces)
    for group in shared:
        if group.name in shared_spaces:
            collector.leg(shared_spaces[group.name], group.bias_tensor, "vector", axis=1, is_outer=True)
    for mixture in mixtures:
        _expert_rules(collector, mixture)
    for residual in residuals:
        residual_rules(collector, residual)
    collector.missing.update(missing or {})
    return collector.finish()


def _heads_leg(collector: Collector, space: Space, heads: Heads, variance: Variance, *, members: int = 1) -> None:
    """A leg on the rows (and the bias) of ``heads``, one block per key-value head."""
    for tensor, axis in ((heads.weight, heads.axis), (heads.bias, heads.bias_axis)):
        collector.leg(
            space,
            tensor,
            variance,
            axis=axis,
            offset=heads.offset,
            block_stride=heads.group_stride,
            element_stride=heads.element_stride,
            spectators=((members, heads.member_stride),),
            in_slice=heads.slice,
        )


def _score_rules(collector: Collector, block: Attention) -> None:
    """Queries and keys: Q' = A Q, K' = A^-T K, for every A that commutes with what lies between them."""
    if block.norm is not None:
        _normed_score_rules(collector, block, block.norm)
        return
    for index, part in enumerate(block.parts):
        suffix = "" if len(block.parts) == 1 else f".{index}"
        blocks = 1 if part.shared_key else block.groups
        kind: GroupKind = "rotary" if part.rotary else "general_linear"
        limit = (
            f"rotary positions ({part.rotary} pairs) commute only with one complex number per pair"
            if part.rotary
            else ""
        )
        if part.shared_key:
            limit += "; all query heads share one key"
        space = collector.space(
            f"{block.name}.query_key{suffix}",
            "query_key",
            kind,
            blocks=blocks,
            size=part.size,
            pairing=part.rotary,
            limit=limit,
            is_cross=block.is_cross,
        )
        for query in block.queries_of(index):
            if part.shared_key:
                spectators = ((block.groups, query.group_stride), (block.members, query.member_stride))
                for tensor, axis in ((query.weight, query.axis), (query.bias, 0)):
                    collector.leg(space, tensor, "vector", axis=axis, offset=query.offset, spectators=spectators)
            else:
                _heads_leg(collector, space, query, "vector", members=block.members)
        for key in block.keys_of(index):
            _heads_leg(collector, space, key, "covector")


def _normed_score_rules(collector: Collector, block: Attention, norm: QueryKeyNorm) -> None:
    """Queries and keys behind a norm: the norm swallows scales and keeps signs; its gains trade scales.

    The scales are exact only where the norm's epsilon is negligible, and are marked so.
    """
    first, size = _whole_head(block)
    if norm.kind == "layer" and norm.scope == "full":
        _wide_layer_norm_rules(collector, block, norm)
        return
    if norm.kind == "layer":
        reason = "a LayerNorm per head on queries and keys keeps one sign per head; its gains trade scales"
        # The mean is subtracted, so only a sign common to the head passes, and only where no bias follows.
        if all(one.query_bias is None and one.key_bias is None for one in block.norms):
            _query_key_space(collector, block, "sign", "block_sign", block.groups, size, first, reason)
        _shared_gain_rules(collector, block, norm, reason)
        _scale_rules(collector, block, norm, (block.num_heads, block.groups), size, reason)
        return
    if norm.scope == "full":
        reason = "a full-width RMS norm on queries and keys keeps signs; its gains trade scales"
        scales = (1, 1)
    else:
        reason = "an RMS norm per head on queries and keys keeps signs and quarter turns; its gains trade scales"
        scales = (block.num_heads, block.groups)
    start = 0
    for index, part in enumerate(block.parts):
        suffix = "" if len(block.parts) == 1 else f".{index}"
        _query_key_space(collector, block, f"sign{suffix}", "pair_sign", block.groups, part.size, index, reason)
        if norm.scope == "full":
            _wide_gain_rules(collector, block, norm, part, suffix, start, reason)
        else:
            _turn_rules(collector, block, index, suffix, start, reason)
        start += part.size
    if norm.scope == "head":
        _shared_gain_rules(collector, block, norm, reason)
    _scale_rules(collector, block, norm, scales, size, reason)


def _wide_layer_norm_rules(collector: Collector, block: Attention, norm: QueryKeyNorm) -> None:
    """A LayerNorm over all heads at once: the mean ties their signs together, gains and biases trade scales."""
    reason = "a full-width LayerNorm on queries and keys keeps one sign; its gains trade scales"
    first, size = _whole_head(block)
    if norm.query_bias is None and norm.key_bias is None:
        space = _normed_space(collector, block, "sign", "block_sign", 1, size, reason)
        for heads, members in ((block.parts[first].query, block.members), (block.parts[first].key, 1)):
            spectators = ((block.groups, heads.group_stride), (members, heads.member_stride))
            for tensor, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
                collector.leg(space, tensor, "vector", axis=axis, offset=heads.offset, spectators=spectators)
    start = 0
    for index, part in enumerate(block.parts):
        suffix = "" if len(block.parts) == 1 else f".{index}"
        _wide_gain_rules(collector, block, norm, part, suffix, start, reason)
        start += part.size
    _scale_rules(collector, block, norm, (1, 1), size, reason)


def _wide_gain_rules(
    collector: Collector, block: Attention, norm: QueryKeyNorm, part: ScorePart, suffix: str, start: int, reason: str
) -> None:
    """Gains of a norm over the full width: one for every coordinate of every head."""
    if not norm.query_gains:
        return
    size = sum(other.size for other in block.parts)
    kind: GroupKind = "diagonal" if norm.kind == "layer" and part.rotary is None else "pair_scale"
    space = _normed_space(collector, block, f"gain{suffix}", kind, block.groups, part.size, reason)
    (query_gain,), (key_gain,) = norm.query_gains, norm.key_gains
    stride, members = block.members * size, ((block.members, size),)
    for tensor in (query_gain, norm.query_bias):
        collector.leg(space, tensor, "vector", offset=start, block_stride=stride, spectators=members)
    for tensor in (key_gain, norm.key_bias):
        collector.leg(space, tensor, "covector", offset=start, block_stride=size)
    if norm.offset:
        collector.gain_offset |= {query_gain: norm.offset, key_gain: norm.offset}


def _turn_rules(collector: Collector, block: Attention, part: int, suffix: str, start: int, reason: str) -> None:
    """Quarter turns of the pairs of every head at once, which the gains follow."""
    turn = _normed_space(collector, block, f"turn{suffix}", "quarter_turn", 1, block.parts[part].size, reason)
    for sides, count in ((block.queries_of(part), block.members), (block.keys_of(part), 1)):
        for heads in sides:
            spectators = ((block.groups, heads.group_stride), (count, heads.member_stride))
            for tensor, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
                collector.leg(turn, tensor, "vector", axis=axis, offset=heads.offset, spectators=spectators)
    for norm in block.norms:
        for tensor in (*norm.query_gains, *norm.key_gains):
            collector.leg(turn, tensor, "gain", axis=norm.gain_axis, offset=start)
            if norm.offset:
                collector.gain_offset[tensor] = norm.offset


def _normed_space(
    collector: Collector,
    block: Attention,
    label: str,
    kind: GroupKind,
    blocks: int,
    size: int,
    reason: str,
    epsilon: float = 0.0,
) -> Space:
    pairing: Pairing = next((part.rotary for part in block.parts if part.rotary), "half")
    is_paired = kind in {"pair_sign", "pair_scale", "quarter_turn"}
    return collector.space(
        f"{block.name}.query_key_{label}",
        "query_key",
        kind,
        blocks=blocks,
        size=size,
        pairing=pairing if is_paired else None,
        limit=reason,
        is_cross=block.is_cross,
        epsilon=epsilon,
    )


def _query_key_space(
    collector: Collector, block: Attention, label: str, kind: GroupKind, blocks: int, size: int, part: int, reason: str
) -> None:
    """A group of signs, the same on the queries and the key of each key-value head; ``part`` says where they start."""
    space = _normed_space(collector, block, label, kind, blocks, size, reason)
    for query in block.queries_of(part):
        _heads_leg(collector, space, query, "vector", members=block.members)
    for key in block.keys_of(part):
        _heads_leg(collector, space, key, "vector")


def _shared_gain_rules(collector: Collector, block: Attention, norm: QueryKeyNorm, reason: str) -> None:
    """Gains (and biases) after the norm: queries times t, keys over t, t tied within a rotary pair."""
    if not norm.query_gains:
        return
    start = 0
    for index, part in enumerate(block.parts):
        kind: GroupKind = "pair_scale" if part.rotary else "diagonal"
        label = "gain" if len(block.parts) == 1 else f"gain.{index}"
        space = _normed_space(collector, block, label, kind, 1, part.size, reason)
        for own in block.norms:
            sides: tuple[tuple[tuple[str, ...], str | None, Variance], ...] = (
                (own.query_gains, own.query_bias, "vector"),
                (own.key_gains, own.key_bias, "covector"),
            )
            for gains, bias, variance in sides:
                for tensor in gains:
                    collector.leg(space, tensor, variance, axis=own.gain_axis, offset=start)
                    if own.offset:
                        collector.gain_offset[tensor] = own.offset
                collector.leg(space, bias, variance, offset=start)
        start += part.size


def _scale_rules(
    collector: Collector, block: Attention, norm: QueryKeyNorm, blocks: tuple[int, int], size: int, reason: str
) -> None:
    """A positive scale per norm, on queries and on keys each on its own: the norm after them removes it."""
    first, _ = _whole_head(block)
    for stream, (query, key) in enumerate(zip(block.queries_of(first), block.keys_of(first), strict=True)):
        sides = (("query_scale", query, block.num_heads, blocks[0]), ("key_scale", key, block.groups, blocks[1]))
        for label, heads, count, number in sides:
            width = size * count // number
            label = f"{label}.{stream}" if stream else label
            space = _normed_space(collector, block, label, "block_scale", number, width, reason, epsilon=norm.epsilon)
            for tensor, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
                collector.leg(space, tensor, "vector", axis=axis, offset=heads.offset, block_stride=width)


def _whole_head(block: Attention) -> tuple[int, int]:
    """The part that query and key heads start with, and the size of all parts side by side, as a norm sees them."""
    first = min(range(len(block.parts)), key=lambda index: block.parts[index].query.offset)
    return first, sum(part.size for part in block.parts)


_VALUE_LIMITS: Mapping[ValueGroup, str] = {
    "general_linear": "",
    "orthogonal": "a norm sits on the values of every head",
    "diagonal": "something multiplies each coordinate of the attention's result",
}


def _value_rules(collector: Collector, block: Attention) -> None:
    """Values: V' = B V, O' = O B^-1. The softmax mixes whole value vectors, so any invertible B commutes.

    A norm without gains on the values keeps rotations, what multiplies each coordinate of the result a scale for each.
    """
    space = collector.space(
        f"{block.name}.value_output",
        "value_output",
        block.value_group,
        blocks=block.groups,
        size=block.value_size,
        limit=_VALUE_LIMITS[block.value_group],
        is_cross=block.is_cross,
    )
    for value in block.values:
        _heads_leg(collector, space, value, "vector")
    for output in block.outputs:
        _heads_leg(collector, space, output, "covector", members=block.members)


def _head_rules(
    collector: Collector, block: Attention, shared: SharedHeads | None, shared_spaces: dict[str, Space]
) -> None:
    """Key-value heads in another order, each with its query heads; together where a bias belongs to each head."""
    if block.groups == 1 or (block.heads_limit and shared is None):
        return
    if shared is None:
        space = collector.space(
            f"{block.name}.heads", "heads", "permutation", blocks=1, size=block.groups, is_cross=block.is_cross
        )
    else:
        existing = shared_spaces.get(shared.name)
        space = existing or collector.space(
            f"{shared.name}.heads",
            "heads",
            "permutation",
            blocks=1,
            size=block.groups,
            limit="a relative position bias per head is shared by every layer of the stack",
        )
        shared_spaces[shared.name] = space
    parts = list(enumerate(block.parts))
    rows = [(query, block.members, part.size) for index, part in parts for query in block.queries_of(index)]
    rows += [(key, 1, part.size) for index, part in parts if not part.shared_key for key in block.keys_of(index)]
    rows += [(value, 1, block.value_size) for value in block.values]
    rows += [(output, block.members, block.value_size) for output in block.outputs]
    for heads, members, size in rows:
        for tensor, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
            collector.leg(
                space,
                tensor,
                "vector",
                axis=axis,
                offset=heads.offset,
                element_stride=heads.group_stride,
                spectators=((members, heads.member_stride), (size, 1)),
                is_outer=True,
            )
    norm = block.norm
    if norm is not None and norm.scope == "full":
        size = sum(part.size for part in block.parts)
        sides = ((*norm.query_gains, norm.query_bias), block.members), ((*norm.key_gains, norm.key_bias), 1)
        for tensors, members in sides:
            for tensor in tensors:
                collector.leg(
                    space,
                    tensor,
                    "vector",
                    element_stride=members * size,
                    spectators=((members, size), (size, 1)),
                    is_outer=True,
                )


def _feed_forward_rules(collector: Collector, block: FeedForward) -> None:
    """Hidden units in another order; and a scale per unit between up and down where the activation lets it by."""
    if block.along:
        scale = None
    elif block.gate is not None and not block.scale_limit:
        scale = collector.space(
            f"{block.name}.scale",
            "feed_forward",
            "diagonal",
            blocks=1,
            size=block.size,
            limit="only between up and down: the gate passes through its activation",
        )
    elif block.gate is None and block.activation == "relu":
        scale = collector.space(
            f"{block.name}.scale",
            "feed_forward",
            "positive_diagonal",
            blocks=1,
            size=block.size,
            limit="relu lets positive scales through",
        )
    else:
        scale = None
    if scale is not None:
        _heads_leg(collector, scale, block.up, "vector")
        _heads_leg(collector, scale, block.down, "covector")
    through = "what each unit passes by itself" if block.along else "the activation"
    limit = "" if scale else block.scale_limit or f"{through} lets only a reordering through"
    order = collector.space(
        f"{block.name}.order", "feed_forward", "permutation", blocks=1, size=block.size, limit=limit
    )
    for heads in block.places:
        _heads_leg(collector, order, heads, "vector")


def _expert_rules(collector: Collector, mixture: Mixture) -> None:
    """Experts in another order, with the router's rows; in groups, inside each group, and the groups as wholes."""
    size = len(mixture.experts) // mixture.groups
    limit = "the router first chooses groups of experts" if mixture.groups > 1 else ""
    inside = collector.space(
        f"{mixture.name}.experts", "experts", "permutation", blocks=mixture.groups, size=size, limit=limit
    )
    for tensor in mixture.indexed:
        collector.leg(inside, tensor, "vector", block_stride=size, is_outer=True)
    legs = [Leg(inside.name, 0, "vector", 0, size)]
    if mixture.groups > 1:
        groups = collector.space(
            f"{mixture.name}.expert_groups", "experts", "permutation", blocks=1, size=mixture.groups, limit=limit
        )
        for tensor in mixture.indexed:
            collector.leg(groups, tensor, "vector", element_stride=size, spectators=((size, 1),), is_outer=True)
        legs.append(Leg(groups.name, 0, "vector", 0, 0, size, ((size, 1),)))
    collector.stacks += [Stack(members, tuple(legs)) for members in mixture.stacks]


def tensor_extents(symmetry: SymmetryMap) -> Mapping[str, Mapping[int, int]]:
    """For each tensor, the least length each of its axes must have to hold every leg."""
    extents: dict[str, dict[int, int]] = {}
    for name, legs in symmetry.legs.items():
        for leg in legs:
            axes = extents.setdefault(name, {})
            axes[leg.axis] = max(axes.get(leg.axis, 0), leg.extent(symmetry.spaces[leg.space]))
            if leg.slice is not None:
                axes[0] = max(axes.get(0, 0), leg.slice + 1)
    return extents


def possible_lengths(symmetry: SymmetryMap) -> Mapping[str, Mapping[int, frozenset[int]]]:
    """For each tensor, the lengths that each of its axes may have.

    The least that holds every leg; or whole blocks, where legs take a part of each and the last ends with what they do
    not take (queries and gates by turns).
    """
    whole: dict[tuple[str, int], int] = {}
    for name, legs in symmetry.legs.items():
        for leg in legs:
            length = symmetry.spaces[leg.space].blocks * leg.block_stride
            whole[name, leg.axis] = max(whole.get((name, leg.axis), 0), length)
    return {
        name: {axis: frozenset({least, max(least, whole.get((name, axis), 0))}) for axis, least in axes.items()}
        for name, axes in tensor_extents(symmetry).items()
    }
