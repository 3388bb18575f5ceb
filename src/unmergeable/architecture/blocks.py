"""What a family declares: where a block's heads and hidden units lie, and what happens between them.

A family is a table of these. :func:`symmetry_map` turns the table into spaces and legs with one rule per
kind of block, so that "which group survives RoPE and a QK norm" is written once for all families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from unmergeable.architecture.collector import Collector
from unmergeable.architecture.residual import Residual, StreamAxis, residual_rules
from unmergeable.architecture.symmetry import GroupKind, Leg, Pairing, Space, Stack, SymmetryMap, Variance

Position = Literal["none", "alibi", "relative_bias", "rotary"]
Activation = Literal["relu", "other"]


@dataclass(frozen=True)
class Heads:
    """Where heads lie on one axis of a weight: head (g, m) starts at ``offset + g*group_stride + m*member_stride``.

    ``g`` counts key-value heads, ``m`` the query heads that share one. ``axis`` is 0 for the rows of a
    ``[out, in]`` weight, 1 for its columns (an output projection, or GPT-2's transposed storage). The bias, when
    there is one, follows the rows. Several blocks may name one tensor: fused storage is nothing special.
    """

    weight: str
    bias: str | None
    axis: int
    offset: int
    group_stride: int
    member_stride: int = 0


@dataclass(frozen=True)
class ScorePart:
    """One term of the attention score: ``size`` coordinates of every query and key head, and their pairing.

    ``rotary`` is None where no rotary embedding acts on these coordinates. ``shared_key``: one key head for
    all query heads (the rotary part of multi-head latent attention).
    """

    query: Heads
    key: Heads
    size: int
    rotary: Pairing | None = None
    shared_key: bool = False


@dataclass(frozen=True)
class QueryKeyNorm:
    """A norm on queries and keys between projection and rotary embedding.

    ``kind``: RMS, or a LayerNorm (subtracts the mean). ``scope``: over each head's coordinates, or over the full
    width. The gains are tensors ``[size]`` (or ``[heads, size]`` with ``gain_axis`` 1): one for all heads, or
    one tensor for each. ``offset``: 1 where a gain is stored as ``gain - 1``.
    """

    kind: Literal["rms", "layer"]
    scope: Literal["head", "full"]
    epsilon: float
    query_gains: tuple[str, ...]
    key_gains: tuple[str, ...]
    query_bias: str | None = None
    key_bias: str | None = None
    gain_axis: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Latent:
    """A narrow vector between the stream and a projection: ``expand`` reads the RMS norm of ``compress`` of the stream.

    The latent are the first ``size`` rows of ``compress``; ``gain`` is that of the norm.
    """

    expand: str
    compress: str
    bias: str | None
    gain: str
    size: int
    epsilon: float


@dataclass(frozen=True)
class Attention:
    """One attention block. ``value_size`` is the value head dimension; ``groups`` counts key-value heads.
    ``heads_limit`` says why heads cannot be reordered, empty where they can.
    """

    name: str
    groups: int
    members: int
    parts: tuple[ScorePart, ...]
    value: Heads
    output: Heads
    value_size: int
    position: Position
    norm: QueryKeyNorm | None = None
    is_cross: bool = False
    heads_limit: str = ""
    latents: tuple[Latent, ...] = ()

    @property
    def num_heads(self) -> int:
        return self.groups * self.members


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block, ``down(act(gate) * up)`` or ``down(act(up))`` when ``gate`` is None."""

    name: str
    size: int
    up: Heads
    down: Heads
    gate: Heads | None = None
    activation: Activation = "other"


def output_bias(block: Attention | FeedForward) -> str:
    """Name of the bias of what a block adds, where there is one: in no head's basis, but part of the block."""
    weight = block.output.weight if isinstance(block, Attention) else block.down.weight
    return weight.removesuffix("weight") + "bias"


def stream_readers(block: Attention | FeedForward) -> tuple[StreamAxis, ...]:
    """The weights through which a block reads the stream. Cross-attention reads it only for its queries."""
    if isinstance(block, FeedForward):
        return _axes((heads.weight, 1 - heads.axis) for heads in (block.gate, block.up) if heads is not None)
    projections = [part.query for part in block.parts]
    if not block.is_cross:
        projections += [*(part.key for part in block.parts), block.value]
    compressed = {latent.expand: latent.compress for latent in block.latents}
    return _axes((compressed.get(heads.weight, heads.weight), 1 - heads.axis) for heads in projections)


def mixture_readers(mixture: Mixture) -> tuple[StreamAxis, ...]:
    """The weights through which a mixture reads the stream besides those of its experts' own blocks."""
    router = StreamAxis(mixture.router, 1, "covector")
    return (router, StreamAxis(mixture.fused.up, 2, "covector")) if mixture.fused else (router,)


def memory_readers(block: Attention) -> tuple[StreamAxis, ...]:
    """The weights through which cross-attention reads another stream."""
    return _axes((heads.weight, 1 - heads.axis) for heads in (*(part.key for part in block.parts), block.value))


def _axes(places: Iterable[tuple[str, int]]) -> tuple[StreamAxis, ...]:
    # A fused weight is named by several projections, and lies along the stream once.
    return tuple(StreamAxis(tensor, axis, "covector") for tensor, axis in dict.fromkeys(places))


@dataclass(frozen=True)
class SharedHeads:
    """Attention blocks whose heads can only be permuted together, with the columns of ``bias_tensor``."""

    name: str
    blocks: tuple[str, ...]
    bias_tensor: str


@dataclass(frozen=True)
class FusedExperts:
    """All experts in two tensors: ``up`` [experts, 2 * units, hidden], gate above up, and ``down`` [experts, hidden,
    units]. Hidden units lie along two axes at once here, and their order is not declared.
    """

    up: str
    down: str


@dataclass(frozen=True)
class Mixture:
    """Experts behind a router, each a feed-forward among the blocks, or all of them ``fused`` in two tensors.

    ``router`` [experts, hidden] scores them, ``router_bias`` [experts] is added for choosing. ``groups``: how many
    equal runs of experts the router chooses among first. ``stacks``: for every kind of tensor an expert has, the names
    in the order of the experts.
    """

    name: str
    router: str
    router_bias: str | None
    experts: tuple[str, ...]
    stacks: tuple[tuple[str, ...], ...]
    groups: int = 1
    fused: FusedExperts | None = None

    @property
    def indexed(self) -> tuple[str, ...]:
        """Tensors with one entry for each expert along their first axis."""
        fused = (self.fused.up, self.fused.down) if self.fused else ()
        return tuple(name for name in (self.router, self.router_bias, *fused) if name)


@dataclass(frozen=True)
class Architecture:
    """A network as its blocks. ``untouched`` are tensors the map knows and no block owns (norms, embeddings, heads).

    ``exposed`` are streams that the network gives out: their basis is fixed, the norms on them are declared all the
    same. ``missing`` says why a symmetry one might look for is not declared.
    """

    family: str
    blocks: tuple[Attention | FeedForward, ...]
    untouched: tuple[str, ...] = ()
    shared_heads: tuple[SharedHeads, ...] = ()
    mixtures: tuple[Mixture, ...] = ()
    residuals: tuple[Residual, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    exposed: tuple[Residual, ...] = ()
    symmetry: SymmetryMap = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        symmetry = symmetry_map(self.blocks, self.shared_heads, self.mixtures, self.residuals, self.missing)
        object.__setattr__(self, "symmetry", symmetry)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(block for block in self.blocks if isinstance(block, Attention))

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        return tuple(block for block in self.blocks if isinstance(block, FeedForward))


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
    for tensor, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
        collector.leg(
            space,
            tensor,
            variance,
            axis=axis,
            offset=heads.offset,
            block_stride=heads.group_stride,
            spectators=((members, heads.member_stride),),
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
        if part.shared_key:
            spectators = ((block.groups, part.query.group_stride), (block.members, part.query.member_stride))
            for tensor, axis in ((part.query.weight, part.query.axis), (part.query.bias, 0)):
                collector.leg(space, tensor, "vector", axis=axis, offset=part.query.offset, spectators=spectators)
        else:
            _heads_leg(collector, space, part.query, "vector", members=block.members)
        _heads_leg(collector, space, part.key, "covector")


def _normed_score_rules(collector: Collector, block: Attention, norm: QueryKeyNorm) -> None:
    """Queries and keys behind a norm: the norm swallows scales and keeps signs; its gains trade scales.

    The scales are exact only where the norm's epsilon is negligible, and are marked so.
    """
    query, key, size = _whole_head(block)
    if norm.kind == "layer":
        reason = "a LayerNorm per head on queries and keys keeps one sign per head; its gains trade scales"
        # The mean is subtracted, so only a sign common to the head passes, and only where no bias follows.
        if norm.query_bias is None and norm.key_bias is None:
            _query_key_space(collector, block, "sign", "block_sign", block.groups, size, query, key, reason)
        _shared_gain_rules(collector, block, norm, reason)
        _scale_rules(collector, block, norm, (block.num_heads, block.groups), size, reason)
        return
    if norm.scope == "full":
        reason = "a full-width RMS norm on queries and keys keeps signs; its gains trade scales"
        _query_key_space(collector, block, "sign", "pair_sign", block.groups, size, query, key, reason)
        gain = _normed_space(collector, block, "gain", "pair_scale", block.groups, size, reason)
        (query_gain,), (key_gain,) = norm.query_gains, norm.key_gains
        members = ((block.members, size),)
        collector.leg(gain, query_gain, "vector", block_stride=block.members * size, spectators=members)
        collector.leg(gain, key_gain, "covector", block_stride=size)
        _scale_rules(collector, block, norm, (1, 1), size, reason)
        return
    reason = "an RMS norm per head on queries and keys keeps signs and quarter turns; its gains trade scales"
    _query_key_space(collector, block, "sign", "pair_sign", block.groups, size, query, key, reason)
    turn = _normed_space(collector, block, "turn", "quarter_turn", 1, size, reason)
    for heads, count in ((query, block.members), (key, 1)):
        spectators = ((block.groups, heads.group_stride), (count, heads.member_stride))
        for tensor, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
            collector.leg(turn, tensor, "vector", axis=axis, offset=heads.offset, spectators=spectators)
    for tensor in (*norm.query_gains, *norm.key_gains):
        collector.leg(turn, tensor, "gain", axis=norm.gain_axis)
    _shared_gain_rules(collector, block, norm, reason)
    _scale_rules(collector, block, norm, (block.num_heads, block.groups), size, reason)


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
    collector: Collector,
    block: Attention,
    label: str,
    kind: GroupKind,
    blocks: int,
    size: int,
    query: Heads,
    key: Heads,
    reason: str,
) -> None:
    """A group of signs, the same on the queries and the key of each key-value head."""
    space = _normed_space(collector, block, label, kind, blocks, size, reason)
    _heads_leg(collector, space, query, "vector", members=block.members)
    _heads_leg(collector, space, key, "vector")


def _shared_gain_rules(collector: Collector, block: Attention, norm: QueryKeyNorm, reason: str) -> None:
    """Gains (and biases) after the norm: queries times t, keys over t, t tied within a rotary pair."""
    start = 0
    for index, part in enumerate(block.parts):
        kind: GroupKind = "pair_scale" if part.rotary else "diagonal"
        label = "gain" if len(block.parts) == 1 else f"gain.{index}"
        space = _normed_space(collector, block, label, kind, 1, part.size, reason)
        sides: tuple[tuple[tuple[str, ...], str | None, Variance], ...] = (
            (norm.query_gains, norm.query_bias, "vector"),
            (norm.key_gains, norm.key_bias, "covector"),
        )
        for gains, bias, variance in sides:
            for tensor in gains:
                collector.leg(space, tensor, variance, axis=norm.gain_axis, offset=start)
                if norm.offset:
                    collector.gain_offset[tensor] = norm.offset
            collector.leg(space, bias, variance, offset=start)
        start += part.size


def _scale_rules(
    collector: Collector, block: Attention, norm: QueryKeyNorm, blocks: tuple[int, int], size: int, reason: str
) -> None:
    """A positive scale per norm, on queries and on keys each on its own: the norm after them removes it."""
    query, key, _ = _whole_head(block)
    sides = (("query_scale", query, block.num_heads, blocks[0]), ("key_scale", key, block.groups, blocks[1]))
    for label, heads, count, number in sides:
        width = size * count // number
        space = _normed_space(collector, block, label, "block_scale", number, width, reason, epsilon=norm.epsilon)
        for tensor, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
            collector.leg(space, tensor, "vector", axis=axis, offset=heads.offset, block_stride=width)


def _whole_head(block: Attention) -> tuple[Heads, Heads, int]:
    """Query and key heads with all their score parts side by side, as a norm over the head sees them."""
    first = min(block.parts, key=lambda part: part.query.offset)
    return first.query, first.key, sum(part.size for part in block.parts)


def _value_rules(collector: Collector, block: Attention) -> None:
    """Values: V' = B V, O' = O B^-1. The softmax mixes whole value vectors, so any invertible B commutes."""
    space = collector.space(
        f"{block.name}.value_output",
        "value_output",
        "general_linear",
        blocks=block.groups,
        size=block.value_size,
        is_cross=block.is_cross,
    )
    _heads_leg(collector, space, block.value, "vector")
    _heads_leg(collector, space, block.output, "covector", members=block.members)


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
    rows = [(part.query, block.members, part.size) for part in block.parts]
    rows += [(part.key, 1, part.size) for part in block.parts if not part.shared_key]
    rows += [(block.value, 1, block.value_size), (block.output, block.members, block.value_size)]
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
        size = block.parts[0].size
        for tensors, members in ((norm.query_gains, block.members), (norm.key_gains, 1)):
            collector.leg(
                space,
                tensors[0],
                "vector",
                element_stride=members * size,
                spectators=((members, size), (size, 1)),
                is_outer=True,
            )


def _feed_forward_rules(collector: Collector, block: FeedForward) -> None:
    """Hidden units in another order; and a scale per unit between up and down where the activation lets it by."""
    if block.gate is not None:
        scale = collector.space(
            f"{block.name}.scale",
            "feed_forward",
            "diagonal",
            blocks=1,
            size=block.size,
            limit="only between up and down: the gate passes through its activation",
        )
    elif block.activation == "relu":
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
    limit = "" if scale else "the activation lets only a reordering through"
    order = collector.space(
        f"{block.name}.order", "feed_forward", "permutation", blocks=1, size=block.size, limit=limit
    )
    for heads in filter(None, (block.gate, block.up, block.down)):
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
    return extents
