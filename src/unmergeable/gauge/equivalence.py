"""Do two checkpoints compute the same function? Decided block by block, in bounded memory, without a framework.

Every attention and feed-forward block is evaluated on random activations from both checkpoints, from the same
declarations the symmetry maps are made of: projections, norms on queries and keys, a random rotation in place of the
rotary embedding (any rotation commutes with what is allowed), a random or the stored bias per head, softmax, output
projection. All tensors outside these blocks must be equal. Two checkpoints that pass on random inputs are equal as
functions up to rounding; the inputs are drawn after the weights are fixed, so nothing can be tuned to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention, FeedForward
from unmergeable.architecture.blocks import Heads, QueryKeyNorm, ScorePart
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UnsupportedArchitecture
from unmergeable.gauge.elements import split_pairs
from unmergeable.progress import Progress, silent
from unmergeable.randomness import Stream

TOKENS = 8
ROUNDED_FACTORS = 4
"""Queries, keys, values, output: each stored with relative error u, amplified at most by the condition number."""

UNIT_ROUNDOFF = {"F64": 2.0**-44, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest relative error of rounding to nearest, by stored dtype. Everything is computed in float64 at best, so for
weights stored in it the error is that of sums over thousands of terms: 2^9 roundings of 2^-53."""

CHUNK_ELEMENTS = 1 << 20


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


def compare(
    first: TensorSource,
    second: TensorSource,
    architecture: Architecture,
    *,
    condition: float,
    seed: int = 0,
    threads: int = 2,
    blocks_only: bool = False,
    progress: Progress = silent,
) -> Equivalence:
    """Compare two checkpoints of one architecture.

    Args:
        first, second: checkpoints with the same tensor names and shapes.
        condition: condition number up to which one may be a rounded transform of the other; bounds grow with it.
        seed: of the random activations.
        threads: blocks evaluated at a time.
        blocks_only: leave out the tensors outside blocks, when they are known to be copies.

    Raises:
        UnsupportedArchitecture: for weights that are not floating point, naming the tensor.
    """
    stream = Stream.from_seed(seed)

    def block_error(block: Attention | FeedForward) -> BlockError:
        scale, expected = _evaluate(block, first, architecture, stream.child(block.name), None)
        _, found = _evaluate(block, second, architecture, stream.child(block.name), scale)
        return BlockError(block.name, _relative_error(found, expected), _bound(block, first, second, condition))

    owned = set(architecture.symmetry.legs)
    outside = [] if blocks_only else [name for name in first.names if name not in owned]

    def is_altered(name: str) -> bool:
        return not _same_values(first.tensor(name), second.tensor(name))

    total = len(architecture.blocks) + len(outside)
    with ThreadPoolExecutor(threads) as pool:
        errors, altered = [], []
        for block_result in pool.map(block_error, architecture.blocks):
            errors.append(block_result)
            progress("verifying", len(errors), total, "tensors")
        for done, (name, differs) in enumerate(zip(outside, pool.map(is_altered, outside), strict=True), 1):
            altered += [name] if differs else []
            progress("verifying", len(errors) + done, total, "tensors")
    return Equivalence(tuple(errors), tuple(altered))


def changed_blocks(architecture: Architecture, spaces: Sequence[str]) -> Architecture:
    """The architecture reduced to the blocks with a tensor in one of ``spaces``: the only ones worth comparing
    when every other tensor was copied byte for byte."""
    touched = set(architecture.symmetry.tensors_of(set(spaces)))
    kept = tuple(block for block in architecture.blocks if touched & set(_tensors(block)))
    return Architecture(architecture.family, kept, architecture.untouched, architecture.shared_heads)


def _tensors(block: Attention | FeedForward) -> list[str]:
    """Every tensor that evaluating a block reads: weights, biases, gains."""
    if isinstance(block, FeedForward):
        every = [heads for heads in (block.gate, block.up, block.down) if heads is not None]
        around: list[str | None] = []
    else:
        every = [heads for part in block.parts for heads in (part.query, part.key)] + [block.value, block.output]
        norm = block.norm
        around = [*norm.query_gains, *norm.key_gains, norm.query_bias, norm.key_bias] if norm else []
    return [name for name in (*(name for heads in every for name in (heads.weight, heads.bias)), *around) if name]


def _bound(block: Attention | FeedForward, first: TensorSource, second: TensorSource, condition: float) -> float:
    """How far rounding may move a block whose tensors are stored as they are.

    Raises:
        UnsupportedArchitecture: for weights that are not floating point, naming the tensor.
    """
    coarsest = 0.0
    for name in _tensors(block):
        for source in (first, second):
            dtype = source.spec(name).dtype
            if dtype not in UNIT_ROUNDOFF:
                raise UnsupportedArchitecture(
                    f"tensor {name} of {source.description} is stored as {dtype}; convert the weights to one of "
                    f"{', '.join(UNIT_ROUNDOFF)}."
                )
            coarsest = max(coarsest, UNIT_ROUNDOFF[dtype])
    return ROUNDED_FACTORS * coarsest * condition


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
    block: Attention | FeedForward,
    source: TensorSource,
    architecture: Architecture,
    stream: Stream,
    scale: float | None,
) -> tuple[float, Tensor]:
    """Output of a block on random activations, and the scale its scores were divided by."""
    reader = _Projections(source, stream)
    if isinstance(block, FeedForward):
        return 1.0, _feed_forward(block, reader)
    bias = _head_bias(block, source, architecture, stream)
    return _attention(block, reader, bias, source, stream, scale)


class _Projections:
    """Weights of one block applied to random inputs, each weight read once however many heads share it."""

    def __init__(self, source: TensorSource, stream: Stream) -> None:
        self._source = source
        self._stream = stream
        self._outputs: dict[str, Tensor] = {}

    def heads(self, heads: Heads, groups: int, members: int, size: int) -> Tensor:
        """The output of a projection as [groups, members, size, tokens]."""
        if heads.weight not in self._outputs:
            self._outputs[heads.weight] = self._project(heads)
        rows = self._outputs[heads.weight]
        strides = (heads.group_stride * TOKENS, heads.member_stride * TOKENS, TOKENS, 1)
        return torch.as_strided(rows, (groups, members, size, TOKENS), strides, heads.offset * TOKENS)

    def read(self, heads: Heads, hidden: Tensor) -> Tensor:
        """A reader (output or down projection) applied to [features, tokens]."""
        return _product(self._source.tensor(heads.weight), hidden, is_transposed=heads.axis == 0)

    def _project(self, heads: Heads) -> Tensor:
        weight = self._source.tensor(heads.weight)
        is_transposed = heads.axis == 1  # [in, out] storage
        features = weight.shape[0] if is_transposed else weight.shape[1]
        inputs = torch.from_numpy(self._stream.child(f"input.{features}").normal(features, TOKENS))
        output = _product(weight, inputs, is_transposed=is_transposed)
        if heads.bias is not None:
            output += self._source.tensor(heads.bias).to(output.dtype)[:, None]
        return output.contiguous()


def _product(weight: Tensor, inputs: Tensor, *, is_transposed: bool) -> Tensor:
    """``weight @ inputs`` (or ``weight.T @ inputs``) in float64, converting the weight a chunk at a time.

    Half-precision weights are converted to float32, whose error is far below theirs; others to float64.
    """
    compute = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else torch.float64
    # With few inputs, (x^T W^T)^T streams the weight three times as fast as W x.
    rows = inputs.to(compute).T.contiguous()
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    if not is_transposed:
        return torch.cat([rows @ chunk.to(compute).T for chunk in weight.split(step)], dim=1).double().T
    pieces = zip(weight.split(step), rows.split(step, dim=1), strict=True)
    return torch.stack([part @ chunk.to(compute) for chunk, part in pieces]).sum(0).double().T


def _feed_forward(block: FeedForward, reader: _Projections) -> Tensor:
    # Any nonlinearity tells an allowed change from a forbidden one; relu is special in letting scales through.
    activate: Callable[[Tensor], Tensor] = torch.relu if block.activation == "relu" else torch.nn.functional.gelu
    up = reader.heads(block.up, 1, 1, block.size)[0, 0]
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
) -> tuple[float, Tensor]:
    queries = [reader.heads(part.query, block.groups, block.members, part.size) for part in block.parts]
    keys = [reader.heads(part.key, 1 if part.shared_key else block.groups, 1, part.size) for part in block.parts]
    if block.norm is not None:
        queries = _normed(queries, block.norm, block.norm.query_gains, block.norm.query_bias, source)
        keys = _normed(keys, block.norm, block.norm.key_gains, block.norm.key_bias, source)
    scores = torch.zeros(block.groups, block.members, TOKENS, TOKENS, dtype=torch.float64)
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
    values = reader.heads(block.value, block.groups, 1, block.value_size)
    mixed = torch.einsum("gmts,gds->gmdt", scores.softmax(-1), values[:, 0])
    return scale, reader.read(block.output, mixed.reshape(-1, TOKENS))


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
    gain = torch.stack([source.tensor(name).double() for name in gains]) + norm.offset
    groups, members, size, _ = heads.shape
    shape = (groups, members, size, 1) if gain.numel() == groups * members * size else (1, 1, size, 1)
    heads = heads * gain.reshape(shape)
    if bias is not None:
        heads = heads + source.tensor(bias).double().reshape(1, 1, size, 1)
    return list(torch.split(heads, sizes, dim=2))


def _rotated(heads: Tensor, part: ScorePart, stream: Stream) -> Tensor:
    """A random angle for every token and frequency pair in place of the rotary embedding's."""
    if part.rotary is None:
        return heads
    angles = torch.from_numpy(stream.uniform(part.size // 2, TOKENS)) * (2 * math.pi)
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
