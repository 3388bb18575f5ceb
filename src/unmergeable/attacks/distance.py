"""How far a checkpoint is from its base: Frobenius distance per block, of queries and keys, values and output, FFN.

Measured over exactly the numbers that a symmetry of the block can change: the rows and columns of its heads and
hidden units, the biases that follow them, the gains of norms on queries and keys. Relative to the base, in the
Frobenius norm. A change of basis inflates it at will, so the raw figure says nothing about how much was learnt; the
figure after ``nearest_orbit`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention, FeedForward
from unmergeable.architecture.blocks import Heads
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, Mismatch
from unmergeable.progress import Progress, silent
from unmergeable.sums import pieces

PartName = Literal["query_key", "value_output", "feed_forward"]


@dataclass(frozen=True)
class Section:
    """Some coordinates of one axis of a tensor: ``size`` of them from every start ``offset + g*group + m*member``.

    ``size`` None stands for the whole tensor. Several parts may own sections of one fused tensor. Coordinates are
    ``stride`` apart. ``slice``: in this slice of the tensor along its first axis alone.
    """

    tensor: str
    axis: int = 0
    offset: int = 0
    groups: tuple[int, int] = (1, 0)
    members: tuple[int, int] = (1, 0)
    size: int | None = None
    stride: int = 1
    slice: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This section of ``tensor``: a view, or a copy where the coordinates leave gaps."""
        if self.size is None:
            return tensor
        starts = [torch.arange(count) * stride for count, stride in (self.groups, self.members)]
        grid = starts[0][:, None, None] + starts[1][None, :, None] + torch.arange(self.size) * self.stride
        index = torch.unique(self.offset + grid)
        piece, axis = (tensor, self.axis) if self.slice is None else (tensor[self.slice], self.axis - 1)
        return piece if len(index) == piece.shape[axis] else piece.index_select(axis, index)


@dataclass(frozen=True)
class Part:
    """The sections of a block that belong together: queries and keys, values and output, or a feed-forward."""

    block: str
    name: PartName
    sections: tuple[Section, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors with a section here, each once."""
        return tuple(dict.fromkeys(section.tensor for section in self.sections))

    def holds(self, tensor: str, slice_of_it: int | None) -> bool:
        """Whether a slice of a tensor (None: what is in no slice) belongs here, beside those of other parts."""
        return any(section.tensor == tensor and section.slice in {None, slice_of_it} for section in self.sections)


@dataclass(frozen=True)
class Distance:
    """Frobenius norm of (checkpoint - base) over one part of a block, that of the base, and how many numbers it has."""

    block: str
    part: PartName
    difference: float
    base_norm: float
    numel: int

    @property
    def relative(self) -> float:
        """``difference / base_norm``; infinite where the base is zero and the checkpoint is not."""
        return relative_distance([self])


def relative_distance(distances: Iterable[Distance]) -> float:
    """The relative Frobenius distance over several parts taken together."""
    distances = tuple(distances)
    difference = math.hypot(*(distance.difference for distance in distances))
    base_norm = math.hypot(*(distance.base_norm for distance in distances))
    if base_norm == 0:
        return math.inf if difference else 0.0
    return difference / base_norm


def parts(architecture: Architecture) -> tuple[Part, ...]:
    """The parts of every block, in the order of the network."""
    every: list[Part] = []
    for block in architecture.blocks:
        if isinstance(block, FeedForward):
            heads = [member for member in (block.gate, block.up, block.down) if member is not None]
            sections = [section for member in heads for section in _sections(member, block.size)]
            every.append(Part(block.name, "feed_forward", tuple(sections)))
        else:
            every.append(Part(block.name, "query_key", tuple(_query_key_sections(block))))
            every.append(Part(block.name, "value_output", tuple(_value_output_sections(block))))
    return tuple(every)


def block_distances(
    checkpoint: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
) -> tuple[Distance, ...]:
    """Distance of every part of every block to the base, as stored; one part's tensors in memory at a time.

    Raises:
        Mismatch: when the two do not hold the same tensors.
        BadInput: when one holds NaN or infinity.
    """
    every = parts(architecture)
    require_comparable(checkpoint, base, every)
    distances: list[Distance] = []
    for part in every:
        distances.append(part_distance(part, checkpoint.tensor, base.tensor))
        if not math.isfinite(distances[-1].difference):
            raise BadInput(
                f"{part.block}: {checkpoint.description} or {base.description} holds NaN or infinity there; "
                "download it again."
            )
        progress("measuring", len(distances), len(every), "parts")
    return tuple(distances)


def part_distance(part: Part, checkpoint: Callable[[str], Tensor], base: Callable[[str], Tensor]) -> Distance:
    """Distance of one part between two readers of tensors by name."""
    difference = base_norm = 0.0
    numel = 0
    for name in part.tensors:
        ours, theirs = checkpoint(name), base(name)
        for section in part.sections:
            if section.tensor == name:
                numel += section.of(theirs).numel()
                for moved, fixed in pieces(section.of(ours), section.of(theirs)):
                    difference += float((moved - fixed).square().sum())
                    base_norm += float(fixed.square().sum())
    return Distance(part.block, part.name, math.sqrt(difference), math.sqrt(base_norm), numel)


def require_comparable(checkpoint: TensorSource, base: TensorSource, selected: Iterable[Part]) -> None:
    """Require both to hold every tensor of the parts, in one shape. A head on top may differ.

    Raises:
        Mismatch: naming the first tensor that is missing or of another shape.
    """
    held = [(source, set(source.names)) for source in (checkpoint, base)]
    for name in dict.fromkeys(name for part in selected for name in part.tensors):
        for source, names in held:
            if name not in names:
                raise Mismatch(f"tensor {name} is missing from {source.description}; give the base of this checkpoint.")
        ours, theirs = checkpoint.spec(name), base.spec(name)
        if ours.shape != theirs.shape:
            raise Mismatch(
                f"tensor {name} has shape {list(ours.shape)} in {checkpoint.description} but {list(theirs.shape)} in "
                f"{base.description}; give the base of this checkpoint."
            )


def _query_key_sections(block: Attention) -> Iterator[Section]:
    for index, part in enumerate(block.parts):
        for query in block.queries_of(index):
            yield from _sections(query, part.size, groups=block.groups, members=block.members)
        for key in block.keys_of(index):
            yield from _sections(key, part.size, groups=1 if part.shared_key else block.groups)
    for norm in block.norms:
        for name in (*norm.query_gains, *norm.key_gains, norm.query_bias, norm.key_bias):
            if name is not None:
                yield Section(name)


def _value_output_sections(block: Attention) -> Iterator[Section]:
    for value in block.values:
        yield from _sections(value, block.value_size, groups=block.groups)
    for output in block.outputs:
        yield from _sections(output, block.value_size, groups=block.groups, members=block.members)


def _sections(heads: Heads, size: int, *, groups: int = 1, members: int = 1) -> Iterator[Section]:
    for tensor, axis in ((heads.weight, heads.axis), (heads.bias, heads.bias_axis)):
        if tensor is not None:
            group, member = (groups, heads.group_stride), (members, heads.member_stride)
            yield Section(tensor, axis, heads.offset, group, member, size, heads.element_stride, heads.slice)
