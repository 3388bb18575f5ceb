"""What no change of basis covers: constants that may be added to one tensor and taken back in another.

With W [out, in], a norm n(x) with gain g and bias b, and any vector c, u or s of the right length, each of these leaves
the function alone:

    value bias      b_v + c          with the output bias  b_o - W_o c       softmax weights add up to one
    key bias        b_k + c          without rotary positions                one number on all scores of a query
    norm bias       b + c            with every reader's bias  b_r - W_r c
    after the block b + c            with the block's readers so, and its output bias  b_o - c     norms behind blocks
    norm gain       g * s            with every reader's columns  W_r / s
    layer scale     l * s            with the writer's rows  W / s and  b / s
    unseen reading  W_r + u (1/g)^T  with  b_r - u sum(b/g)                  a LayerNorm's output / g adds up to zero
    unseen writing  W + (1/l) u^T    and the same on biases                  a LayerNorm subtracts the mean
    router          every row + c    of a softmax router
    summed rows     r + c            with  r' - c  in another table that is always added: words and positions, biases of
                                     blocks side by side
    position bias   every row + c    of a table of biases on scores: one number on all scores of a head

They combine. So they are described as one thing: :class:`Neutral` is the member of a checkpoint's class in which all
of them have been undone (biases moved on until nothing can be moved, gains and scales 1, unseen directions 0), the same
for every checkpoint of the class up to rounding. It commutes with every change of basis, and so may stand before any.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import FeedForward, Heads, output_bias
from unmergeable.architecture.residual import Norm, Residual, Rows, StreamAxis
from unmergeable.checkpoint.source import DerivedSource, TensorSource


@dataclass(frozen=True)
class NormReader:
    """A weight that reads a norm along ``axis``, ``copies`` times, and its bias."""

    weight: str
    axis: int
    copies: int
    bias: str | None


@dataclass(frozen=True)
class NormFreedom:
    """``trades_gain``: its gain trades with the readers' columns. ``bias``: it trades with the readers' biases, and
    with ``output_bias`` where the norm stands behind a block; ``scaled_bias``: one that no reader can take, and that
    keeps its ratio to the gain. ``is_blind``: the output over the gain adds up to zero.
    """

    gain: str
    offset: float
    trades_gain: bool
    bias: str | None
    scaled_bias: str | None
    readers: tuple[NormReader, ...]
    output_bias: str | None = None
    is_blind: bool = False


@dataclass(frozen=True)
class Writer:
    """A tensor that adds to the stream along ``axis``, by ``layer_scale`` if any. ``is_blind``: its mean is not seen.

    ``is_matrix``: what a block or embedding writes; biases are not.
    """

    tensor: str
    axis: int
    layer_scale: str | None
    is_blind: bool
    is_matrix: bool = True


@dataclass(frozen=True)
class ValueFreedom:
    """A bias of values trades with ``output_bias``. ``value`` [groups, size] and ``output`` [groups, members, size] are
    the places of the heads on the rows of the one projection and on the columns of the other.
    """

    block: Attention
    bias: str
    output_bias: str
    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class Freedoms:
    """Every additive freedom of a checkpoint. ``keys``: entries of biases that the softmax does not see.

    ``sums``: rows that are always added up, one of each. ``position_biases``: tables [distances, heads] whose columns
    may have anything added.
    """

    norms: tuple[NormFreedom, ...]
    writers: tuple[Writer, ...]
    values: tuple[ValueFreedom, ...]
    keys: tuple[tuple[str, Tensor], ...]
    routers: tuple[str, ...]
    sums: tuple[tuple[Rows, ...], ...] = ()
    position_biases: tuple[str, ...] = ()

    @cached_property
    def reading(self) -> dict[str, tuple[NormFreedom, NormReader]]:
        """By the weight of a reader, its norm and itself."""
        return {reader.weight: (norm, reader) for norm in self.norms for reader in norm.readers}

    @cached_property
    def reader_of_bias(self) -> dict[str, tuple[NormFreedom, NormReader]]:
        """By the bias of a reader, its norm and itself."""
        return {reader.bias: (norm, reader) for norm, reader in self.reading.values() if reader.bias}

    @cached_property
    def by_tensor(self) -> dict[str, Writer]:
        return {writer.tensor: writer for writer in self.writers}

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Every tensor that some freedom may change."""
        names: set[str | None] = {*self.routers, *self.by_tensor, *self.reading, *self.reader_of_bias}
        names |= {name for norm in self.norms for name in (norm.bias, norm.scaled_bias, norm.output_bias)}
        names |= {norm.gain for norm in self.norms if norm.trades_gain}
        names |= {writer.layer_scale for writer in self.writers}
        names |= {name for value in self.values for name in (value.bias, value.output_bias)}
        names |= {name for name, _ in self.keys}
        names |= {*self.summed, *self.position_biases}
        return frozenset(name for name in names if name is not None)

    @cached_property
    def summed(self) -> frozenset[str]:
        """Every tensor with rows that are added to others."""
        return frozenset(name for rows in self.sums for one in rows for name in (one.tensor, *one.twins))

    def count(self, source: TensorSource) -> int:
        """How many numbers are free."""
        free = sum(value.value.numel() for value in self.values) + sum(places.numel() for _, places in self.keys)
        for norm in self.norms:
            width = source.spec(norm.gain).numel
            free += width * (norm.trades_gain + (norm.bias is not None))
            for reader in norm.readers if norm.is_blind else ():
                free += source.spec(reader.weight).numel // width
        for scale in {writer.layer_scale for writer in self.writers if writer.layer_scale is not None}:
            free += source.spec(scale).numel
        for writer in self.writers:
            free += source.spec(writer.tensor).numel // source.spec(writer.tensor).shape[writer.axis] * writer.is_blind
        return free + sum(source.spec(router).shape[-1] for router in self.routers)


def freedoms_of(architecture: Architecture, names: Container[str]) -> Freedoms:
    """The additive freedoms that a checkpoint with these tensors has."""
    streams = (*architecture.residuals, *architecture.exposed)
    scales = {block: gain for stream in streams for gain, block in stream.layer_scales.items() if gain in names}
    blocks = {block.name: block for block in architecture.blocks}
    biases = {heads.weight: heads.bias for block in architecture.blocks for heads in _projections(block)}

    def bias_of(weight: str) -> str | None:
        name = biases.get(weight, weight.removesuffix("weight") + "bias")
        return name if name is not None and name in names and name != weight else None

    norms: list[NormFreedom] = []
    writers: dict[str, Writer] = {}
    for stream in streams:
        centred = _centred_blocks(stream)
        for norm in stream.norms:
            freedom = _norm_freedom(norm, stream, blocks, bias_of, names)
            norms += [freedom] if freedom is not None else []
        for block in architecture.blocks:
            down = block.output if isinstance(block, Attention) else block.down
            axis = StreamAxis(down.weight, 1 - down.axis, "vector")
            if axis in stream.axes and (block.name in scales or block.name in centred or _is_centred(stream)):
                is_blind = _is_centred(stream) or block.name in centred
                for name, place in ((down.weight, axis.axis), (output_bias(block), 0)):
                    if name in names:
                        writers[name] = Writer(name, place, scales.get(block.name), is_blind, name == down.weight)
        for item in stream.axes if _is_centred(stream) else ():
            if item.variance == "vector" and item.tensor != stream.tied and item.tensor in names:
                is_matrix = not item.tensor.endswith("bias")
                writers.setdefault(item.tensor, Writer(item.tensor, item.axis, None, True, is_matrix))
    values, keys = [], []
    for attention in architecture.attentions:
        if attention.joined:  # what one stream's biases add, the other's would have to add too
            continue
        value, output = attention.value, output_bias(attention)
        if value.bias is not None and output in names:
            places = head_places(attention.output, attention.groups, attention.members, attention.value_size)
            rows = head_places(value, attention.groups, 1, attention.value_size)[:, 0]
            values.append(ValueFreedom(attention, value.bias, output, rows, places))
        keys += list(_unseen_keys(attention))
    # A router with a bias for choosing scores by sigmoids, which see a common vector.
    routers = tuple(mixture.router for mixture in architecture.mixtures if mixture.router_bias is None)
    sums = tuple(rows for stream in streams for rows in stream.sums)
    biases_of_positions = tuple(heads.bias_tensor for heads in architecture.shared_heads if heads.bias_tensor in names)
    return Freedoms(
        tuple(norms), tuple(writers.values()), tuple(values), tuple(keys), routers, sums, biases_of_positions
    )


def head_places(heads: Heads, groups: int, members: int, size: int) -> Tensor:
    """Where the coordinates of heads lie on their axis: [groups, members, size]."""
    group, member = torch.arange(groups) * heads.group_stride, torch.arange(members) * heads.member_stride
    return heads.offset + group[:, None, None] + member[None, :, None] + torch.arange(size) * heads.element_stride


def _projections(block: Attention | FeedForward) -> list[Heads]:
    if isinstance(block, FeedForward):
        return [heads for heads in (block.gate, block.up) if heads is not None]
    return [block.value, *(heads for part in block.parts for heads in (part.query, part.key))]


def _is_centred(stream: Residual) -> bool:
    """Whether all that reads the stream, or is given out, passes a LayerNorm first."""
    read = {reader.tensor for norm in stream.norms for reader in norm.readers}
    raw = any(axis.variance == "covector" and axis.tensor not in read for axis in stream.axes)
    return stream.kind == "layer" and bool(read) and not raw and (not stream.is_exposed or stream.is_normed_out)


def _centred_blocks(stream: Residual) -> set[str]:
    """Where norms stand behind blocks, those with such a norm behind them."""
    if stream.kind != "layer":
        return set()
    return {norm.then for norm, _ in zip(stream.norms, stream.norms[1:], strict=False) if norm.then}


def _norm_freedom(
    norm: Norm,
    stream: Residual,
    blocks: dict[str, Attention | FeedForward],
    bias_of: Callable[[str], str | None],
    names: Container[str],
) -> NormFreedom | None:
    if norm.gain not in names:
        return None
    axes, output = norm.readers, None
    if norm.then:
        block = blocks[norm.then]
        weights = {heads.weight: heads for heads in _projections(block)}
        axes = tuple(StreamAxis(name, 1 - heads.axis, "covector") for name, heads in weights.items())
        output = output_bias(block)
        output = output if output in names else None
    readers = tuple(NormReader(axis.tensor, axis.axis, axis.copies, bias_of(axis.tensor)) for axis in axes)
    if not all(reader.weight in names for reader in readers) or not readers:
        return None
    has_biases = all(reader.bias for reader in readers) and (not norm.then or output is not None)
    bias = norm.bias if has_biases else None
    is_blind = stream.kind == "layer" and (norm.bias is None or bias is not None)
    # A norm behind a block gives out the stream itself, which more than its readers see.
    scaled_bias = norm.bias if bias is None and not norm.then else None
    return NormFreedom(norm.gain, norm.offset, not norm.then, bias, scaled_bias, readers, output, is_blind)


def _unseen_keys(attention: Attention) -> Iterator[tuple[str, Tensor]]:
    if attention.norm is not None:
        return
    for part in attention.parts:
        if part.rotary is None and part.key.bias is not None:
            yield part.key.bias, head_places(part.key, 1 if part.shared_key else attention.groups, 1, part.size)


def along(tensor: Tensor, axis: int) -> Tensor:
    """A view of ``tensor`` with ``axis`` last, as a matrix wherever it can be one."""
    return tensor.movedim(axis, -1)


def copies_of(weight: Tensor, reader: NormReader, width: int) -> Iterator[Tensor]:
    """Views [..., width] of the columns by which a reader sees its norm, once for each copy."""
    for copy in range(reader.copies):
        yield along(weight, reader.axis)[..., copy * width : (copy + 1) * width]


@dataclass(frozen=True)
class Neutral(DerivedSource):
    """``original`` with every additive freedom undone, tensors in float64: the same function."""

    freedoms: Freedoms
    _small: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        tensor = self._untraded(name)
        if name in self.freedoms.summed:
            tensor = tensor.contiguous()
        for rows in self.freedoms.sums:
            for number, one in enumerate(rows):
                if name in (one.tensor, *one.twins):
                    others = [self._constant_of_rows(other) for other in rows[:-1]]
                    is_last = number == len(rows) - 1
                    places = one.of(tensor) if name == one.tensor else tensor.view(-1, tensor.shape[-1])
                    places += sum(others) if is_last else -others[number]
        return tensor

    def _constant_of_rows(self, rows: Rows) -> Tensor:
        """The mean of what they are once everything else is undone."""
        key = f"{rows.tensor} {rows.first} {rows.last}"
        if key not in self._small:
            self._small[key] = rows.of(self._untraded(rows.tensor)).mean(0)
        return self._small[key]

    def _untraded(self, name: str) -> Tensor:
        """With all undone but sums."""
        if name not in self.freedoms.tensors:
            return self.original.tensor(name)
        tensor = self._raw(name)
        if name in self.freedoms.position_biases:
            return tensor - tensor.mean(0)
        for norm in self.freedoms.norms:
            if name == norm.gain and norm.trades_gain:
                return torch.where(tensor + norm.offset == 0, tensor, 1.0 - norm.offset)
            if name == norm.bias:
                return torch.zeros_like(tensor)
            if name == norm.scaled_bias:
                gain = self._vector(norm.gain) + norm.offset
                return torch.where(gain == 0, tensor, tensor / gain)
        if any(name == writer.layer_scale for writer in self.freedoms.writers):
            return torch.where(tensor == 0, tensor, 1.0)
        if name in self.freedoms.reading:
            self._read(name, tensor)
        if name in self.freedoms.routers:
            tensor -= tensor.mean(0)
        if name in self.freedoms.reader_of_bias:
            tensor += self._constant(name)
        for value in self.freedoms.values:
            if name == value.output_bias:
                tensor += self._constant_of_values(value)
        for norm in self.freedoms.norms:
            if name == norm.output_bias and norm.bias is not None:
                tensor += self._raw(norm.bias)
        if name in self.freedoms.by_tensor:
            self._write(self.freedoms.by_tensor[name], tensor)
        for bias, places in self.freedoms.keys:
            if name == bias:
                tensor[places.flatten()] = 0
        for value in self.freedoms.values:
            if name == value.bias:
                tensor[value.value.flatten()] = 0
        return tensor

    def _raw(self, name: str) -> Tensor:
        return self.original.tensor(name).double()

    def _vector(self, name: str) -> Tensor:
        """A gain, scale or bias, kept: many tensors ask for it."""
        if name not in self._small:
            self._small[name] = self._raw(name)
        return self._small[name]

    def _read(self, name: str, tensor: Tensor) -> None:
        """The reader's columns times the gain where it trades, and without what they make of a vector of ones."""
        norm, reader = self.freedoms.reading[name]
        gain = self._vector(norm.gain) + norm.offset
        ones = 1.0 if norm.trades_gain else 1 / gain  # a multiple of this is not seen
        for columns in copies_of(tensor, reader, len(gain)):
            if norm.trades_gain:
                columns *= torch.where(gain == 0, 1.0, gain)
            if norm.is_blind and bool((gain != 0).all()):
                columns -= (columns / ones).mean(-1, keepdim=True) * ones

    def _write(self, writer: Writer, tensor: Tensor) -> None:
        """The writer's rows times the layer scale, and without their mean."""
        columns = along(tensor, writer.axis)
        if writer.layer_scale is not None:
            scale = self._vector(writer.layer_scale)
            columns *= torch.where(scale == 0, 1.0, scale)
            if bool((scale == 0).any()):
                return  # a coordinate that is not written tells the others apart
        if writer.is_blind:
            columns -= columns.mean(-1, keepdim=True)

    def _constant(self, bias: str) -> Tensor:
        """What a reader makes of its norm's bias."""
        norm, reader = self.freedoms.reader_of_bias[bias]
        if norm.bias is None:
            return torch.zeros(())
        return through(self._raw(reader.weight), reader.axis, self._vector(norm.bias).repeat(reader.copies))

    def _constant_of_values(self, value: ValueFreedom) -> Tensor:
        """What the output projection makes of the bias of the values, that of their norm included."""
        bias = self._raw(value.bias)
        if value.bias in self.freedoms.reader_of_bias:
            bias += self._constant(value.bias)
        return of_values(value, self._raw(value.block.output.weight), bias)


def through(weight: Tensor, axis: int, vector: Tensor) -> Tensor:
    """``weight`` along ``axis`` applied to ``vector``, which may be shorter."""
    rows = along(weight, axis)
    return rows[..., : len(vector)] @ vector


def of_values(value: ValueFreedom, output: Tensor, bias: Tensor) -> Tensor:
    """The output projection ``output``, laid out as stored, applied to the heads' shares of ``bias``."""
    columns = along(output.double(), value.block.output.axis)
    shares = bias[value.value][:, None].expand(value.output.shape)
    return columns[:, value.output.flatten()] @ shares.flatten()
