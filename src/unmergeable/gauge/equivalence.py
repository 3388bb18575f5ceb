"""Do two checkpoints compute the same function? Decided block by block, in bounded memory, without a framework.

Every attention and feed-forward block is evaluated on random activations from both checkpoints, from the same
declarations the symmetry maps are made of: projections, norms on queries and keys, a random rotation in place of the
rotary embedding (any rotation commutes with what is allowed), a random or the stored bias per head, softmax, output
projection. The experts behind a router are one block. All tensors outside these blocks must be equal. Two checkpoints
that pass on random inputs are equal as functions up to rounding; the inputs are drawn after the weights are fixed, so
nothing can be tuned to them.

Where the residual stream itself may be in another basis (``through_streams``), activations must be given in each
checkpoint's own: :mod:`unmergeable.gauge.activations` makes them from its embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention, FeedForward, Mixture
from unmergeable.architecture.blocks import FusedExperts, Heads, QueryKeyNorm, ScorePart
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.errors import UnsupportedArchitecture
from unmergeable.gauge.act import compute_dtype
from unmergeable.gauge.activations import TOKENS, Activations, RandomActivations, StreamActivations, product
from unmergeable.gauge.elements import split_pairs
from unmergeable.progress import Progress, silent
from unmergeable.randomness import Stream

Block = Attention | FeedForward | Mixture

_Again = Callable[[int], Tensor]
"""The output of a side once more, with simulated roundings."""

ROUNDED_FACTORS = 4
"""Queries, keys, values, output: each stored with relative error u, amplified at most by the condition number."""

STREAM_FACTORS = 3
"""More of them through streams: the embeddings an input is made of, those an output is read by, the gain between."""

UNIT_ROUNDOFF = {"F64": 2.0**-44, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest relative error of rounding to nearest, by stored dtype. Everything is computed in float64 at best, so for
weights stored in it the error is that of sums over thousands of terms: 2^9 roundings of 2^-53."""


MARGIN = 2.0
"""How many times the error that rounding is measured to make may be there. Roundings are simulated as uniform over the
whole of a unit roundoff, which is 1.4 times what rounding to nearest makes in the mean."""


@dataclass(frozen=True)
class Rounded(DerivedSource):
    """``original`` with every number off by as much as storing it may make it, at random."""

    stream: Stream

    def tensor(self, name: str) -> Tensor:
        stored, dtype = self.original.tensor(name), self.spec(name).dtype
        if dtype not in UNIT_ROUNDOFF:
            return stored
        return off_by(stored, UNIT_ROUNDOFF[dtype], self.stream.child(name))


def off_by(tensor: Tensor, unit: float, stream: Stream) -> Tensor:
    """A copy with independent relative errors, uniform up to ``unit``; float32 for the 16-bit formats, else float64."""
    generator = torch.Generator().manual_seed(int(2**53 * float(stream.uniform(1)[0])))
    exact = tensor.to(compute_dtype(tensor.dtype))
    return exact * (1 + unit * (2 * torch.rand(exact.shape, generator=generator, dtype=exact.dtype) - 1))


def amplified(condition: float) -> float:
    """By how much a matrix with singular values spread evenly over this condition, on a logarithmic scale, amplifies
    errors and shrinks what they are errors of, both in the root mean square: sinh(ln k) / ln k.
    """
    spread = math.log(max(condition, 1.0))
    return math.sinh(spread) / spread if spread > 0 else 1.0


@dataclass(frozen=True)
class BlockError:
    """How far one block's output moved, relative in the Frobenius norm, and how far rounding may move it.

    An output that is not a number is equal to nothing, itself included.
    """

    name: str
    error: float
    bound: float

    @property
    def is_equal(self) -> bool:
        return self.error <= self.bound  # False for a NaN

    @property
    def excess(self) -> float:
        """The error in units of the bound; infinite for an output that is not a number."""
        return math.inf if math.isnan(self.error) else self.error / self.bound


@dataclass(frozen=True)
class Equivalence:
    """The comparison of two checkpoints: every block, and the tensors outside blocks that differ."""

    blocks: tuple[BlockError, ...]
    altered: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        return not self.altered and all(block.is_equal for block in self.blocks)

    @property
    def worst(self) -> BlockError | None:
        """The block furthest beyond (or nearest to) its bound."""
        return max(self.blocks, key=lambda block: block.excess, default=None)

    def explain(self) -> str:
        """One clause for an error message."""
        if self.altered:
            more = f" and {len(self.altered) - 1} more" if len(self.altered) > 1 else ""
            return f"tensor {self.altered[0]}{more} differs outside the blocks a symmetry may change"
        worst = self.worst
        assert worst is not None
        if math.isnan(worst.error):
            return f"block {worst.name} computes numbers that are not finite"
        return f"block {worst.name} is off by {worst.error:.2e} relative, rounding explains {worst.bound:.2e}"


def rounded_factors(*, through_streams: bool) -> int:
    """How many stored numbers lie on the way through a block: the factor of the bound on its error."""
    return ROUNDED_FACTORS + (STREAM_FACTORS if through_streams else 0)


def compare(
    first: TensorSource,
    second: TensorSource,
    architecture: Architecture,
    *,
    condition: float,
    seed: int = 0,
    threads: int = 2,
    blocks_only: bool = False,
    through_streams: bool = False,
    rounded: tuple[TensorSource, TensorSource] | None = None,
    computed: Collection[str] = (),
    progress: Progress = silent,
) -> Equivalence:
    """Compare two checkpoints of one architecture.

    Args:
        first, second: checkpoints with the same tensor names and shapes.
        condition: condition number up to which one may be a rounded transform of the other; bounds grow with it.
        seed: of the random activations.
        threads: blocks evaluated at a time.
        blocks_only: leave out the tensors outside blocks (and streams), when they are known to be copies.
        through_streams: the bases of residual streams and the gains of their norms may differ too.
        rounded: both checkpoints with simulated roundings (:class:`Rounded`). Bounds are then measured on them, and
            hold for this checkpoint in this basis; the condition number only covers roundings made in between.
        computed: tensors outside blocks that are themselves known up to rounding only.

    Raises:
        UnsupportedArchitecture: for weights that are not floating point, naming the tensor.
    """
    comparison = Comparison(
        first,
        second,
        architecture,
        condition=condition,
        seed=seed,
        blocks_only=blocks_only,
        through_streams=through_streams,
        rounded=rounded,
        computed=computed,
    )
    total = comparison.units + len(comparison.outside)
    errors = comparison.errors(
        0, comparison.units, threads, lambda stage, done, _, unit: progress(stage, done, total, unit)
    )
    altered = []
    with ThreadPoolExecutor(threads) as pool:
        differ = pool.map(comparison.is_altered, comparison.outside)
        for done, (name, differs) in enumerate(zip(comparison.outside, differ, strict=True), 1):
            altered += [name] if differs else []
            progress("verifying", len(errors) + done, total, "tensors")
    return Equivalence(tuple(errors), tuple(altered))


class Comparison:
    """What :func:`compare` does, ready to be done in parts: its ``units`` are blocks, and tensors along streams.

    The arguments are those of :func:`compare`. ``outside``: tensors outside of all units, which must be equal.
    """

    def __init__(
        self,
        first: TensorSource,
        second: TensorSource,
        architecture: Architecture,
        *,
        condition: float,
        seed: int = 0,
        blocks_only: bool = False,
        through_streams: bool = False,
        rounded: tuple[TensorSource, TensorSource] | None = None,
        computed: Collection[str] = (),
    ) -> None:
        stream = Stream.from_seed(seed)
        both = (first, second)
        kind = StreamActivations if through_streams else RandomActivations
        sides = [kind.of(source, architecture, stream.child("activations")) for source in (first, second)]
        noisy = [kind.of(source, architecture, stream.child("activations")) for source in rounded or ()]
        factors = rounded_factors(through_streams=through_streams)
        by_name = {block.name: block for block in architecture.blocks}

        def block_error(block: Block) -> BlockError:
            scale, expected = _evaluate(block, by_name, first, sides[0], architecture, stream.child(block.name), None)
            _, found = _evaluate(block, by_name, second, sides[1], architecture, stream.child(block.name), scale)
            bound = factors * condition * _unit(_tensors(block, by_name), *both)

            def again(side: int) -> Tensor:
                assert rounded is not None
                source, activations = rounded[side], noisy[side]
                child = stream.child(block.name)
                return _evaluate(block, by_name, source, activations, architecture, child, scale)[1]

            return measured(block.name, (expected, found), bound, again)

        def tensor_error(name: str) -> BlockError:
            expected, found = (side.contracted(name) for side in sides)
            bound = factors * condition * _unit([name], *both)
            return measured(name, (expected, found), bound, lambda side: noisy[side].contracted(name))

        def computed_error(name: str) -> BlockError:
            expected, found = (source.tensor(name).double() for source in both)
            bound = factors * condition * _unit([name], *both)
            return measured(name, (expected, found), bound, lambda side: (rounded or both)[side].tensor(name).double())

        def measured(name: str, outputs: tuple[Tensor, Tensor], bound: float, again: _Again) -> BlockError:
            """The error, with the bound measured where roundings are simulated and anything differs."""
            error = _relative_error(outputs[1], outputs[0])
            if rounded is None or error == 0 or math.isnan(error):
                return BlockError(name, error, bound)
            first, second = (_relative_error(again(side), outputs[side]) for side in (0, 1))
            # The fewer numbers there are, the more their errors scatter.
            margin = MARGIN * (1 + 3 / math.sqrt(outputs[0].numel()))
            return BlockError(name, error, margin * math.hypot(amplified(condition) * first, second))

        # A router with other rows may stand for experts in other places; with the same each expert is compared alone.
        moved = [
            item
            for item in architecture.mixtures
            if item.fused or item.others or not _same_values(*(side.tensor(item.router) for side in both))
        ]
        blocks = _units(architecture, moved)
        evaluated = {name for block in blocks for name in _tensors(block, by_name)}
        evaluated |= {shared.bias_tensor for shared in architecture.shared_heads}
        along = [name for name in first.names if name not in evaluated and name in sides[0].along]
        seen = evaluated | set(along) | sides[0].seen_through_readers
        self.outside = (
            [] if blocks_only else [name for name in first.names if name not in seen and name not in computed]
        )
        nearly = [name for name in first.names if name not in seen and name in computed]
        self._both = both
        self._units: list[Callable[[], BlockError]] = [
            *(partial(block_error, block) for block in blocks),
            *(partial(tensor_error, name) for name in along),
            *(partial(computed_error, name) for name in nearly),
        ]

    @property
    def units(self) -> int:
        return len(self._units)

    def errors(self, begin: int, end: int, threads: int, progress: Progress = silent) -> list[BlockError]:
        """How far units ``begin`` to ``end`` lie apart, in their order."""
        found: list[BlockError] = []
        with ThreadPoolExecutor(threads) as pool:
            for error in pool.map(lambda unit: unit(), self._units[begin:end]):
                found.append(error)
                progress("verifying", len(found), end - begin, "tensors")
        return found

    def is_altered(self, name: str) -> bool:
        """Whether a tensor outside of all units differs."""
        first, second = (source.tensor(name) for source in self._both)
        return not _same_values(first, second)


def _units(architecture: Architecture, mixtures: Sequence[Mixture]) -> tuple[Block, ...]:
    """What is evaluated as one: blocks, and in place of the experts of ``mixtures`` these."""
    experts = {expert for mixture in mixtures for expert in mixture.experts}
    return (*(block for block in architecture.blocks if block.name not in experts), *mixtures)


def changed_blocks(architecture: Architecture, spaces: Sequence[str]) -> Architecture:
    """The architecture reduced to the blocks with a tensor in one of ``spaces``: the only ones worth comparing
    when every other tensor was copied byte for byte."""
    touched = set(architecture.symmetry.tensors_of(set(spaces)))
    by_name = {block.name: block for block in architecture.blocks}
    mixtures = tuple(item for item in architecture.mixtures if touched & set(_tensors(item, by_name)))
    experts = {expert for mixture in mixtures for expert in mixture.experts}
    kept = tuple(
        block for block in architecture.blocks if block.name in experts or touched & set(_tensors(block, by_name))
    )
    return replace(architecture, blocks=kept, mixtures=mixtures)


def _tensors(block: Block, by_name: Mapping[str, Attention | FeedForward]) -> list[str]:
    """Every tensor that evaluating a block reads: weights, biases, gains."""
    if isinstance(block, Mixture):
        apart = () if block.fused else block.experts
        return [*block.indexed, *(name for expert in apart for name in _tensors(by_name[expert], by_name))]
    if isinstance(block, FeedForward):
        every = list(block.places)
        around: list[str | None] = []
    else:
        every = [*block.projections, *block.outputs]
        around = [
            name
            for norm in block.norms
            for name in (*norm.query_gains, *norm.key_gains, norm.query_bias, norm.key_bias)
        ]
    return [name for name in (*(name for heads in every for name in (heads.weight, heads.bias)), *around) if name]


def _unit(tensors: Iterable[str], first: TensorSource, second: TensorSource) -> float:
    """The coarsest unit roundoff among tensors as they are stored.

    Raises:
        UnsupportedArchitecture: for weights that are not floating point, naming the tensor.
    """
    coarsest = 0.0
    for name in tensors:
        for source in (first, second):
            dtype = source.spec(name).dtype
            if dtype not in UNIT_ROUNDOFF:
                raise UnsupportedArchitecture(
                    f"tensor {name} of {source.description} is stored as {dtype}; convert the weights to one of "
                    f"{', '.join(UNIT_ROUNDOFF)}."
                )
            coarsest = max(coarsest, UNIT_ROUNDOFF[dtype])
    return coarsest


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if torch.equal(found, expected):
        return 0.0  # also where both vanish: a layer that was never trained
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def _same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a NaN counts as kept only where the other has one too."""
    if first.shape != second.shape:
        return False
    if first.dtype == second.dtype:
        return torch.equal(first, second) or bool(torch.allclose(first, second, rtol=0, atol=0, equal_nan=True))
    return torch.equal(first.double(), second.double())


def _evaluate(
    block: Block,
    by_name: Mapping[str, Attention | FeedForward],
    source: TensorSource,
    activations: Activations,
    architecture: Architecture,
    stream: Stream,
    scale: float | None,
) -> tuple[float, Tensor]:
    """Output of a block on given activations, and the scale its scores were divided by."""
    reader = _Projections(source, activations)
    if isinstance(block, FeedForward):
        return 1.0, activations.readout(block.down.weight, _feed_forward(block, reader))
    if isinstance(block, Mixture):
        return _mixture(block, by_name, source, activations, scale)
    bias = _head_bias(block, source, architecture, stream)
    scale, outputs = _attention(block, reader, bias, source, stream, scale)
    read = [activations.readout(name, output) for name, output in outputs.items()]
    return scale, torch.cat([output.reshape(-1) for output in read]) if len(read) > 1 else read[0]


class _Projections:
    """Weights of one block applied to activations, each weight read once however many heads share it."""

    def __init__(self, source: TensorSource, activations: Activations) -> None:
        self._source = source
        self._activations = activations
        self._outputs: dict[tuple[str, int | None], Tensor] = {}
        self._shared: dict[str, Tensor] = {}

    def heads(self, heads: Heads, groups: int, members: int, size: int) -> Tensor:
        """The output of a projection as [groups, members, size, tokens]."""
        place = (heads.weight, heads.slice)
        if place not in self._outputs:
            self._outputs[place] = self._project(heads)
        rows = self._outputs[place]
        strides = (heads.group_stride * TOKENS, heads.member_stride * TOKENS, heads.element_stride * TOKENS, 1)
        return torch.as_strided(rows, (groups, members, size, TOKENS), strides, heads.offset * TOKENS)

    def read(self, heads: Heads, hidden: Tensor) -> Tensor:
        """A reader (output or down projection) applied to [features, tokens], by the columns that read them."""
        weight, axis = self._matrix(heads)
        if weight.shape[axis] > len(hidden):
            weight = weight.narrow(axis, heads.offset, len(hidden))
        return product(weight, hidden, is_transposed=axis == 0)

    def _matrix(self, heads: Heads) -> tuple[Tensor, int]:
        """The weight that heads lie in, as a matrix, and the axis of it.

        The places of a kernel count as further inputs; of one that reads units, a random sum over them is taken.
        """
        if heads.slice is None:
            weight = self._source.tensor(heads.weight)
            if weight.dim() == 1:
                return weight[:, None], 0
            if heads.axis == 1 and weight.dim() > 2 and weight[0, 0].numel() > 1:
                places = weight.flatten(2)
                return places.double() @ self._activations.inputs("", places.shape[2])[:, 0], 1
            return weight.flatten(1), heads.axis
        if heads.weight not in self._shared:  # with all other experts, which are read next
            self._shared[heads.weight] = self._source.tensor(heads.weight)
        return self._shared[heads.weight][heads.slice], heads.axis - 1

    def _project(self, heads: Heads) -> Tensor:
        weight, axis = self._matrix(heads)
        is_transposed = axis == 1  # [in, out] storage
        features = weight.shape[0] if is_transposed else weight.shape[1]
        output = product(weight, self._activations.inputs(heads.weight, features), is_transposed=is_transposed)
        if heads.bias is not None:
            bias = self._source.tensor(heads.bias)
            output += (bias if heads.slice is None else bias[heads.slice]).to(output.dtype)[:, None]
        return output.contiguous()


def _mixture(
    block: Mixture,
    by_name: Mapping[str, Attention | FeedForward],
    source: TensorSource,
    activations: Activations,
    scale: float | None,
) -> tuple[float, Tensor]:
    """All experts, weighted by what a router of this kind may look at: scores, choosing bias, best of the group."""
    router = source.tensor(block.router)
    scores = product(router, activations.inputs(block.router, router.shape[1]), is_transposed=False)
    scale = scale or max(float(scores.std()), 1e-30)
    scores = scores / scale
    choice = scores
    if block.router_bias is not None:
        choice = scores + source.tensor(block.router_bias).double()[:, None]
    best = choice.view(block.groups, -1, TOKENS).amax(1, keepdim=True).expand(-1, len(scores) // block.groups, -1)
    weights = scores.softmax(0) * torch.sigmoid(choice) * torch.sigmoid(best.reshape(choice.shape))
    if block.fused is not None:
        outputs, down = _fused_experts(block.fused, source, activations), block.fused.down
    else:
        experts = [expert for name in block.experts if isinstance(expert := by_name[name], FeedForward)]
        shared = _Projections(source, activations) if block.others else None
        outputs = (_feed_forward(expert, shared or _Projections(source, activations)) for expert in experts)
        down = experts[0].down.weight
    total = torch.zeros(())
    for weight, output in zip(weights, outputs, strict=True):
        total = total + weight * output
    return scale, activations.readout(down, total)


def _fused_experts(fused: FusedExperts, source: TensorSource, activations: Activations) -> Iterator[Tensor]:
    """The output of every expert in turn, [hidden, tokens]."""
    above, below = source.tensor(fused.up), source.tensor(fused.down)
    inputs = activations.inputs(fused.up, above.shape[2])
    for up, down in zip(above, below, strict=True):
        gate, value = product(up, inputs, is_transposed=False).chunk(2)
        yield product(down, torch.nn.functional.gelu(gate) * value, is_transposed=False)


def _feed_forward(block: FeedForward, reader: _Projections) -> Tensor:
    # Any nonlinearity tells an allowed change from a forbidden one; relu is special in letting scales through.
    activate: Callable[[Tensor], Tensor] = torch.relu if block.activation == "relu" else torch.nn.functional.gelu
    up = reader.heads(block.up, 1, 1, block.size)[0, 0]
    for heads in block.along:
        up = up * (1 + reader.heads(heads, 1, 1, block.size)[0, 0])
    if block.gate is None:
        return reader.read(block.down, activate(up))
    return reader.read(block.down, activate(reader.heads(block.gate, 1, 1, block.size)[0, 0]) * up)


def _attention(
    block: Attention,
    reader: _Projections,
    bias: Tensor | None,
    source: TensorSource,
    stream: Stream,
    scale: float | None,
) -> tuple[float, dict[str, Tensor]]:
    """What each output projection gives out; the streams of a joint attention stand one behind the other."""
    tokens = TOKENS * (1 + len(block.joined))
    queries, keys = _queries_and_keys(block, reader, source)
    scores = torch.zeros(block.groups, block.members, tokens, tokens, dtype=torch.float64)
    for index, (part, query, key) in enumerate(zip(block.parts, queries, keys, strict=True)):
        angles = stream.child(f"angles.{index}")
        rotated_query, rotated_key = _rotated(query, part, angles), _rotated(key, part, angles)
        shared_key = rotated_key.expand(block.groups, block.members, -1, -1)
        scores = scores + torch.einsum("gmdt,gmds->gmts", rotated_query, shared_key)
    # Scores of random inputs can be far larger than those of real ones; at unit spread the softmax is well conditioned.
    scale = scale or max(float(scores.std()), 1e-30)
    scores = scores / scale
    if bias is not None:
        scores = scores + bias.expand(-1, TOKENS, TOKENS).reshape(scores.shape)
    values = torch.cat([reader.heads(value, block.groups, 1, block.value_size) for value in block.values], dim=-1)
    mixed = torch.einsum("gmts,gds->gmdt", scores.softmax(-1), values[:, 0]).reshape(-1, tokens)
    readers = (block.output, *(joined.output for joined in block.joined))
    own = zip(readers, mixed.split(TOKENS, dim=-1), strict=True)
    return scale, {output.weight: reader.read(output, gathered) for output, gathered in own if output is not None}


def _queries_and_keys(
    block: Attention, reader: _Projections, source: TensorSource
) -> tuple[list[Tensor], list[Tensor]]:
    """For each part of the score, queries and keys behind their norm as [groups, members, size, tokens]."""
    queries: list[list[Tensor]] = [[] for _ in block.parts]
    keys: list[list[Tensor]] = [[] for _ in block.parts]
    norms = (block.norm, *(joined.norm for joined in block.joined))
    for stream, norm in enumerate(norms if block.parts else ()):
        parts = list(enumerate(block.parts))
        query = [
            reader.heads(block.queries_of(index)[stream], block.groups, block.members, part.size)
            for index, part in parts
        ]
        key = [
            reader.heads(block.keys_of(index)[stream], 1 if part.shared_key else block.groups, 1, part.size)
            for index, part in parts
        ]
        if norm is not None:
            query = _normed(query, norm, norm.query_gains, norm.query_bias, source)
            key = _normed(key, norm, norm.key_gains, norm.key_bias, source)
        for index, _ in parts:
            queries[index].append(query[index])
            keys[index].append(key[index])
    return [torch.cat(part, dim=-1) for part in queries], [torch.cat(part, dim=-1) for part in keys]


def _normed(
    parts: list[Tensor], norm: QueryKeyNorm, gains: tuple[str, ...], bias: str | None, source: TensorSource
) -> list[Tensor]:
    """The norm over each head's coordinates (all score parts side by side) or over the full width."""
    sizes = [part.shape[2] for part in parts]
    heads = torch.cat(parts, dim=2)  # [groups, members, size, tokens]
    dims = (0, 1, 2) if norm.scope == "full" else (2,)
    if norm.kind == "layer":
        heads = heads - heads.mean(dims, keepdim=True)
    heads = heads * torch.rsqrt(heads.square().mean(dims, keepdim=True) + norm.epsilon)
    groups, members, size, _ = heads.shape
    if gains:
        gain = torch.stack([source.tensor(name).double() for name in gains]) + norm.offset
        shape = (groups, members, size, 1) if gain.numel() == groups * members * size else (1, 1, size, 1)
        heads = heads * gain.reshape(shape)
    if bias is not None:
        heads = heads + source.tensor(bias).double().reshape(1, 1, size, 1)
    return list(torch.split(heads, sizes, dim=2))


def _rotated(heads: Tensor, part: ScorePart, stream: Stream) -> Tensor:
    """A random angle for every token and frequency pair in place of the rotary embedding's."""
    if part.rotary is None:
        return heads
    angles = torch.from_numpy(stream.uniform(part.size // 2, heads.shape[-1])) * (2 * math.pi)
    first, second = split_pairs(heads, part.rotary)
    turned = torch.empty_like(heads)
    out_first, out_second = split_pairs(turned, part.rotary)
    out_first.copy_(first * angles.cos() - second * angles.sin())
    out_second.copy_(first * angles.sin() + second * angles.cos())
    return turned


def _head_bias(block: Attention, source: TensorSource, architecture: Architecture, stream: Stream) -> Tensor | None:
    """What tells heads apart besides their weights: ALiBi slopes, or the columns of a relative position bias."""
    distances = stream.child("distance")
    if block.position == "alibi":
        slopes = torch.from_numpy(distances.normal(block.num_heads))
        return slopes[:, None, None] * torch.arange(TOKENS)[None, None, :]
    for shared in architecture.shared_heads:
        if block.name in shared.blocks:
            table = source.tensor(shared.bias_tensor).double()  # [buckets, heads]
            buckets = torch.from_numpy(distances.uniform(TOKENS, TOKENS) * table.shape[0]).long()
            return table[buckets].permute(2, 0, 1)
    return None
