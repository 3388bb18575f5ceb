"""What a family declares: where a block's heads and hidden units lie, and what happens between them.

A family is a table of these; :mod:`~unmergeable.architecture.rules` turns the table into spaces and legs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from unmergeable.architecture.residual import StreamAxis
from unmergeable.architecture.symmetry import Pairing

Position = Literal["none", "alibi", "relative_bias", "rotary"]
Activation = Literal["relu", "other"]
ValueGroup = Literal["general_linear", "orthogonal", "diagonal"]


@dataclass(frozen=True)
class Heads:
    """Where heads lie on one axis of a weight: head (g, m) starts at ``offset + g*group_stride + m*member_stride``.

    ``g`` counts key-value heads, ``m`` the query heads that share one. ``axis`` is 0 for the rows of a
    ``[out, in]`` weight, 1 for its columns (an output projection, or GPT-2's transposed storage). The bias, when
    there is one, follows the rows. Several blocks may name one tensor: fused storage is nothing special.
    Coordinates of a head are ``element_stride`` apart: 2 where gate and up take turns. ``slice``: heads lie in this
    slice of the tensors along their first axis alone, as one of several experts does; ``axis`` is one of the others.
    """

    weight: str
    bias: str | None
    axis: int
    offset: int
    group_stride: int
    member_stride: int = 0
    element_stride: int = 1
    slice: int | None = None

    @property
    def bias_axis(self) -> int:
        """The axis of the bias on which heads lie."""
        return 0 if self.slice is None else 1


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
class JoinedStream:
    """Heads of another stream in the softmax of an attention: text beside an image (SD 3, Flux).

    The same bases as the block's own, in weights of their own: a query of either stream meets keys and values of both.
    ``queries`` and ``keys`` go with the parts of the block, in their order; ``norm`` is of the kind of the block's.
    ``output`` is None where nothing reads what the stream's queries gather, as in a last layer.
    """

    queries: tuple[Heads, ...]
    keys: tuple[Heads, ...]
    value: Heads
    output: Heads | None
    norm: QueryKeyNorm | None = None


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

    ``heads_limit`` says why heads cannot be reordered, empty where they can. ``value_group``: what a head's values let
    through; rotations behind a norm without gains, a scale per coordinate where something multiplies the result.
    ``joined``: other streams in the same softmax.
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
    value_group: ValueGroup = "general_linear"
    joined: tuple[JoinedStream, ...] = ()

    @property
    def num_heads(self) -> int:
        return self.groups * self.members

    @property
    def values(self) -> tuple[Heads, ...]:
        """The values of every stream."""
        return (self.value, *(stream.value for stream in self.joined))

    @property
    def outputs(self) -> tuple[Heads, ...]:
        """What reads the result, for every stream whose result is read."""
        return (self.output, *(stream.output for stream in self.joined if stream.output is not None))

    def queries_of(self, part: int) -> tuple[Heads, ...]:
        """The queries of every stream in one part of the score."""
        return (self.parts[part].query, *(stream.queries[part] for stream in self.joined))

    def keys_of(self, part: int) -> tuple[Heads, ...]:
        """The keys of every stream in one part of the score."""
        return (self.parts[part].key, *(stream.keys[part] for stream in self.joined))

    @property
    def norms(self) -> tuple[QueryKeyNorm, ...]:
        """The norm on queries and keys of every stream that has one."""
        return tuple(norm for norm in (self.norm, *(stream.norm for stream in self.joined)) if norm is not None)

    @property
    def projections(self) -> tuple[Heads, ...]:
        """Everything that writes into a head: queries, keys and values of every stream."""
        sides = (heads for index in range(len(self.parts)) for heads in (*self.queries_of(index), *self.keys_of(index)))
        return (*sides, *self.values)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block, ``down(act(gate) * up)`` or ``down(act(up))`` when ``gate`` is None.

    ``scale_limit`` says why hidden units of a gated block cannot be scaled (``up`` is clamped), empty where they can.
    ``along``: where tensors between up and down hold something of each unit: a depthwise kernel, the statistics of a
    norm, what weighs each unit by all of them. They go where units go; units of such a block are reordered and not
    scaled.
    """

    name: str
    size: int
    up: Heads
    down: Heads
    gate: Heads | None = None
    activation: Activation = "other"
    scale_limit: str = ""
    along: tuple[Heads, ...] = ()

    @property
    def places(self) -> tuple[Heads, ...]:
        """Everywhere that hidden units lie."""
        return tuple(heads for heads in (self.gate, self.up, self.down, *self.along) if heads is not None)


def output_weight(block: Attention | FeedForward) -> str:
    """Name of the weight through which a block adds to the stream."""
    return block.output.weight if isinstance(block, Attention) else block.down.weight


def output_bias(block: Attention | FeedForward) -> str:
    """Name of the bias of what a block adds, where there is one: in no head's basis, but part of the block."""
    weight = output_weight(block)
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
    in the order of the experts. ``others``: tensors that hold all experts' blocks, one along their first axis each.
    """

    name: str
    router: str
    router_bias: str | None
    experts: tuple[str, ...]
    stacks: tuple[tuple[str, ...], ...]
    groups: int = 1
    fused: FusedExperts | None = None
    others: tuple[str, ...] = ()

    @property
    def indexed(self) -> tuple[str, ...]:
        """Tensors with one entry for each expert along their first axis."""
        fused = (self.fused.up, self.fused.down) if self.fused else ()
        return tuple(name for name in (self.router, self.router_bias, *fused, *self.others) if name)
