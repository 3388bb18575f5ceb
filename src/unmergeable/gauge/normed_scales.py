"""Scales that a norm divides out: the one number by which everything that adds to a stream may be multiplied.

A norm gives the same for x and for c x, up to its epsilon, and exactly with c^2 epsilon in the place of epsilon. So
each of these leaves the function alone, for any c > 0:

    stream      embeddings and all that blocks add to it times c; what reads it without a norm by c; the gain of the
                last norm by c where the output head is the embedding                     pre-norm (Llama, GPT-2, ViT)
    what a block adds       times c, before a norm of its own                             Gemma 2, OLMo 2
    stream of these         embeddings and the gains of such norms times c
    between two norms       gain and bias of the first times c, the block's readers by c, what it adds times c    BERT
    embeddings              all of them times c, before the norm on their sum             BERT, CLIP's images

One such number takes a checkpoint as far from its base as anyone likes, and no change of basis brings it back. It shows
in the weights: in lengths that no rotation, permutation or change of basis of a head alters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import FeedForward, Heads, output_bias, output_weight, stream_readers
from unmergeable.architecture.residual import Norm, Residual
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.gauge.additive import head_places
from unmergeable.sums import pieces, squares_along

Measure = Callable[[TensorSource], float | None]
"""A length in a checkpoint that is proportional to the scale, and that nothing else alters; None where there is none.

Of a length that is compared with the base's, tensors must have the base's shapes, but for rows that were added.
"""

MOVED = 0.25
"""Powers of two that a scale must be away from the base's: further than a fine-tune takes lengths of whole tensors."""

TOGETHER = 0.1
"""Powers of two within which a scale is the one that the epsilon in the config tells exactly."""

_EPSILON = re.compile(r"(^|_)eps(ilon)?$")


@dataclass(frozen=True)
class NormedScale:
    """``up`` are multiplied, ``down`` divided by one number; ``offsets``: gains that are stored less that.

    ``width`` of the stream: lengths are only comparable with those in a stream of the same width.
    """

    name: str
    up: tuple[str, ...]
    down: tuple[str, ...]
    offsets: Mapping[str, float]
    measure: Measure
    width: int


@dataclass(frozen=True)
class Rescaled(DerivedSource):
    """``original`` with tensors times numbers, in the stored dtype, and ``changes`` of its config.

    ``found``: the numbers by what they scaled.
    """

    factors: Mapping[str, float]
    offsets: Mapping[str, float]
    changes: Mapping[str, Any]
    found: Mapping[str, float]

    @property
    def config(self) -> Mapping[str, Any]:
        return {**self.original.config, **self.changes}

    def tensor(self, name: str) -> Tensor:
        tensor = self.original.tensor(name)
        if name not in self.factors:
            return tensor
        offset = self.offsets.get(name, 0.0)
        scaled = (tensor.double() + offset) * self.factors[name] - offset
        return scaled.to(torch_dtype(self.spec(name).dtype))


def normed_scales(architecture: Architecture, source: TensorSource) -> tuple[NormedScale, ...]:
    """Every scale of a checkpoint's streams that a norm divides out."""
    found: list[NormedScale] = []
    for stream in (*architecture.residuals, *architecture.exposed):
        if any(norm.then for norm in stream.norms):
            found += _between_norms(stream, architecture, source)
        else:
            found += _of_stream(stream, architecture, source)
    return tuple(scale for scale in found if all(name in source.index.entries for name in scale.up[:1]))


def rescaled(
    source: TensorSource, scales: Sequence[NormedScale], factors: Sequence[float], changes: Mapping[str, Any]
) -> Rescaled:
    """``source`` with each of ``scales`` times its number; ``changes`` of the config go with them."""
    products: dict[str, float] = {}
    for scale, factor in zip(scales, factors, strict=True):
        for name in scale.up:
            products[name] = products.get(name, 1.0) * factor
        for name in scale.down:
            products[name] = products.get(name, 1.0) / factor
    offsets = {name: offset for scale in scales for name, offset in scale.offsets.items()}
    found = {scale.name: factor for scale, factor in zip(scales, factors, strict=True)}
    there = {name: factor for name, factor in products.items() if name in source.index.entries}
    return Rescaled(source, there, offsets, changes, found)


def as_in_base(protected: TensorSource, base: TensorSource, architecture: Architecture) -> Rescaled | None:
    """``protected`` with the scales of ``base``; None where none is far from it.

    Scales are read off lengths of weights, which fine-tuning changes a little. Where the epsilon of the norms was
    changed with a scale it says which it was, exactly.

    Args:
        architecture: of ``protected``, which may have more layers or units than ``base``.
    """
    told = _told_by_epsilon(protected.config, base.config)
    moved: list[NormedScale] = []
    factors: list[float] = []
    is_told = False
    for scale in normed_scales(architecture, protected):
        if not _is_as_wide(scale, protected, base):
            continue
        # What is found of a stream changes the weights by which a block reads it.
        ours, theirs = scale.measure(rescaled(protected, moved, factors, {})), scale.measure(base)
        if not ours or not theirs or not math.isfinite(ours):
            continue
        powers = math.log2(theirs / ours)
        if told is not None and abs(powers - told) < TOGETHER:
            powers, is_told = told, True
        elif abs(powers) < MOVED:
            continue
        moved.append(scale)
        factors.append(2.0**powers)
    if not moved:
        return None
    return rescaled(protected, moved, factors, epsilons_of(base.config) if is_told else {})


def _is_as_wide(scale: NormedScale, protected: TensorSource, base: TensorSource) -> bool:
    name = scale.up[0]
    if name not in base.index.entries:
        return False
    ours, theirs = protected.spec(name).shape, base.spec(name).shape
    return len(ours) == len(theirs) and all(
        length == same for length, same in zip(ours, theirs, strict=True) if length == scale.width
    )


def epsilons_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every entry of a config that says what the norms add to the variance; sections whole, where they hold one."""
    return {key: value for key, value in config.items() if any(True for _ in _epsilons(key, value))}


def with_epsilons(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Those entries with every epsilon times ``factor``."""
    return {key: _times(key, value, factor) for key, value in epsilons_of(config).items()}


def _times(key: str, value: Any, factor: float) -> Any:
    if isinstance(value, Mapping):
        return {inner: _times(inner, item, factor) for inner, item in value.items()}
    return value * factor if any(True for _ in _epsilons(key, value)) else value


def _epsilons(key: str, value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _epsilons(inner, item)
    elif _EPSILON.search(str(key)) and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        yield float(value)


def _told_by_epsilon(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float | None:
    """Powers of two from the release's scale to the base's, from their epsilons; None where those are the same."""
    pairs = [
        list(zip(_epsilons(key, ours.get(key)), _epsilons(key, theirs[key]), strict=False))
        for key in theirs
        if key in ours
    ]
    ratios = [theirs / ours for pair in pairs for ours, theirs in pair]
    return math.log2(ratios[0]) / 2 if ratios and not math.isclose(ratios[0], 1.0, rel_tol=1e-9) else None


def _of_stream(stream: Residual, architecture: Architecture, source: TensorSource) -> Iterator[NormedScale]:
    """Where every block reads the stream by a norm or a weight, and adds to it."""
    if (stream.is_exposed and not stream.is_normed_out) or not stream.norms:
        return
    read = {reader.tensor for norm in stream.norms for reader in norm.readers}
    raw = [axis.tensor for axis in stream.axes if axis.variance == "covector" and axis.tensor not in read]
    written = {axis.tensor for axis in stream.axes if axis.variance == "vector"}
    blocks = [block for block in architecture.blocks if output_weight(block) in written]
    added = [name for block in blocks for name in (output_weight(block), output_bias(block)) if name in written]
    embeddings = [axis.tensor for axis in stream.axes if axis.variance == "vector" and axis.tensor not in added]
    last = stream.norms[-1]
    behind = [norm for norm in stream.norms[:-1] if not norm.readers]
    down = [*raw, *(_of_norm(last) if stream.tied else ())]
    if not embeddings:
        return
    length = _row_length(
        embeddings[0], next(axis.axis for axis in stream.axes if axis.tensor == embeddings[0]), stream.kind
    )
    if not behind:
        yield _scale(f"stream {stream.name}", [*embeddings, *_with_biases(blocks, source)], down, stream, length)
    elif behind == [stream.norms[0]]:  # a norm on the sum of embeddings; what follows begins with it
        yield _scale(f"embeddings of {stream.name}", embeddings, [], stream, length)
        up = [*_of_norm(behind[0]), *_with_biases(blocks, source)]
        yield _scale(f"stream {stream.name}", up, down, stream, _vector_length(behind[0]))
    else:
        yield _scale(
            f"stream {stream.name}",
            [*embeddings, *(n for norm in behind for n in _of_norm(norm))],
            down,
            stream,
            length,
        )
        readers = {axis.tensor: norm for norm in stream.norms for axis in norm.readers}
        for block in blocks:
            norms = [readers[axis.tensor] for axis in stream_readers(block) if axis.tensor in readers]
            yield _scale(
                f"what {block.name} adds",
                _with_biases([block], source),
                [],
                stream,
                _strength(block, norms[0] if norms else None),
            )


def _between_norms(stream: Residual, architecture: Architecture, source: TensorSource) -> Iterator[NormedScale]:
    """Where norms stand behind blocks, and what a norm gives out is all that the next block sees."""
    blocks = {block.name: block for block in architecture.blocks}
    added = {name for block in blocks.values() for name in (output_weight(block), output_bias(block))}
    embeddings = [axis for axis in stream.axes if axis.variance == "vector" and axis.tensor not in added]
    if embeddings and stream.norms[0].then == architecture.blocks[0].name:  # a norm on the sum of embeddings
        together = stream.norms[0].gain.rsplit(".", 2)[0]
        up = [axis.tensor for axis in embeddings if axis.tensor.startswith(together)]
        # The norm before an output head that is the embedding takes back what the embedding is multiplied by.
        down = [axis.tensor for axis in embeddings if axis.tensor not in up]
        yield _scale(
            f"embeddings of {stream.name}", up, down, stream, _row_length(up[0], embeddings[0].axis, stream.kind)
        )
    for norm in stream.norms[:-1]:
        if not norm.then:
            continue
        block = blocks[norm.then]
        up = [*_of_norm(norm), *_with_biases([block], source)]
        down = [axis.tensor for axis in stream_readers(block)]
        yield _scale(f"stream behind {norm.gain}", up, list(dict.fromkeys(down)), stream, _vector_length(norm))


def _scale(name: str, up: Sequence[str], down: Sequence[str], stream: Residual, measure: Measure) -> NormedScale:
    offsets = {norm.gain: norm.offset for norm in stream.norms if norm.offset}
    return NormedScale(name, tuple(dict.fromkeys(up)), tuple(down), offsets, measure, stream.size)


def _of_norm(norm: Norm) -> list[str]:
    return [norm.gain, *([norm.bias] if norm.bias is not None else [])]


def _with_biases(blocks: Sequence[Attention | FeedForward], source: TensorSource) -> list[str]:
    names = [name for block in blocks for name in (output_weight(block), output_bias(block))]
    return [name for name in names if name in source.index.entries]


def _read(source: TensorSource, name: str) -> Tensor | None:
    if name not in source.index.entries:
        return None
    return source.tensor(name).double()


def _row_length(name: str, axis: int, kind: Literal["rms", "layer"]) -> Measure:
    """The median distance of two rows of an embedding: a few rows that nobody reads say nothing then, nor does a vector
    that was added to all and taken from another table.

    What a LayerNorm sees of it, which is all but the mean.
    """

    def measure(source: TensorSource) -> float | None:
        if name not in source.index.entries:
            return None
        tensor = source.tensor(name)
        if not tensor.numel():
            return None
        rows = tensor.movedim(axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        half = len(rows) // 2
        pairs = pieces(rows[:half], rows[half : 2 * half], flat=False) if half else pieces(rows, 0 * rows, flat=False)
        between = (first - second for first, second in pairs)
        centred = (each - each.mean(-1, keepdim=True) if kind == "layer" else each for each in between)
        return float(torch.cat([each.norm(dim=1) for each in centred]).median())

    return measure


def _vector_length(norm: Norm) -> Measure:
    def measure(source: TensorSource) -> float | None:
        gain = _read(source, norm.gain)
        return None if gain is None else float((gain + norm.offset).norm() / math.sqrt(len(gain)))

    return measure


def _holds(block: Attention | FeedForward, reads: int, writes: int) -> bool:
    """Whether weights with so many rows and columns have all units, or all heads, of a block."""
    if isinstance(block, FeedForward):
        return block.up.offset + block.size <= reads and block.down.offset + block.size <= writes
    of_values = head_places(block.value, block.groups, 1, block.value_size)
    of_output = head_places(block.output, block.groups, block.members, block.value_size)
    return int(of_values.max()) < reads and int(of_output.max()) < writes


def _strength(block: Attention | FeedForward, norm: Norm | None) -> Measure:
    """What a block makes of lengths: of the product of its outer weights, which no basis inside it alters."""

    def measure(source: TensorSource) -> float | None:
        reader, writer = _outer(block)
        if any(side.weight not in source.index.entries for side in (reader, writer)):
            return None
        first, last = (source.tensor(side.weight) for side in (reader, writer))
        if not _holds(block, first.shape[reader.axis], last.shape[writer.axis]):
            return None
        gain = None if norm is None else _read(source, norm.gain)
        factors = None if gain is None or norm is None else gain + norm.offset
        if isinstance(block, FeedForward):
            reading = squares_along(first.narrow(reader.axis, block.up.offset, block.size), reader.axis, factors)
            writing = squares_along(last.narrow(writer.axis, block.down.offset, block.size), writer.axis)
            return float((reading * writing).sum().sqrt())
        reads = first.double().movedim(reader.axis, 0).flatten(1)
        reads = reads if factors is None else reads * factors
        writes = last.double().movedim(writer.axis, 0).flatten(1)
        rows = head_places(block.value, block.groups, 1, block.value_size)[:, 0]
        columns = head_places(block.output, block.groups, block.members, block.value_size)
        total = 0.0
        for group in range(block.groups):
            value = reads[rows[group]]
            for member in range(block.members):
                output = writes[columns[group, member]]
                total += float(((output @ output.T) * (value @ value.T)).sum())
        return math.sqrt(max(total, 0.0))

    return measure


def _outer(block: Attention | FeedForward) -> tuple[Heads, Heads]:
    return (block.value, block.output) if isinstance(block, Attention) else (block.up, block.down)
