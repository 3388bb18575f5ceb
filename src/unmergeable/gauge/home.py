"""One member of the class of checkpoints that trade constants, gains and scales: the one that takes them from another.

:class:`~unmergeable.gauge.additive.Neutral` undoes every trade; from there :class:`Home` makes the trades that bring a
checkpoint's constants, gains, scales and unseen directions to those of any other of the same shapes, its base for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmergeable.architecture.residual import Rows
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.gauge.additive import Freedoms, NormFreedom, Writer, along, copies_of, of_values, through

ALIKE = 0.5
"""Cosine of a column of weights with the base's beyond which it says how the column was scaled."""


@dataclass(frozen=True)
class Home(DerivedSource):
    """The neutral form that ``moved`` gives, in the basis of ``base``, with the constants and scales of ``base``.

    ``original`` lends names and shapes; tensors are float64.
    """

    freedoms: Freedoms
    base: TensorSource
    moved: Callable[[str], Tensor]
    _scales: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def tensor(self, name: str) -> Tensor:
        tensor = self._unsummed(name)
        if name in self.freedoms.summed:
            tensor = tensor.contiguous()
        for rows in self.freedoms.sums:
            for number, one in enumerate(rows):
                if name in (one.tensor, *one.twins):
                    places = one.of(tensor) if name == one.tensor else tensor.view(-1, tensor.shape[-1])
                    places += self._shifts(rows)[number]
        return tensor

    def _shifts(self, rows: tuple[Rows, ...]) -> Tensor:
        """What to add to each of ``rows``, zero in all, to bring them nearest to the base's: [len(rows), hidden].

        With m_i the mean distance of n_i rows, sum n_i |m_i + s_i|^2 is least where n_i (m_i + s_i) is alike for all.
        """
        key = " ".join(f"{one.tensor} {one.first} {one.last}" for one in rows)
        if key not in self._scales:
            away = torch.stack([self._away(one) for one in rows])
            counts = torch.tensor([len(one.of(self._empty(one.tensor))) for one in rows], dtype=torch.float64)
            self._scales[key] = (away.sum(0) / (1 / counts).sum()) / counts[:, None] - away
        return self._scales[key]

    def _away(self, rows: Rows) -> Tensor:
        """The mean distance from the base's rows, over those that both have; from zero if the base has none."""
        ours = rows.of(self._unsummed(rows.tensor))
        theirs = torch.zeros_like(ours)
        entry = self.base.index.entries.get(rows.tensor)
        if entry is not None and self.base.spec(rows.tensor).shape[-1] == ours.shape[-1]:
            theirs = rows.of(self.base.tensor(rows.tensor).double())
        common = min(len(ours), len(theirs))
        away = (ours[:common] - theirs[:common]).mean(0)
        writer = self.freedoms.by_tensor.get(rows.tensor)
        return away - away.mean() if writer is not None and writer.is_blind else away

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self.spec(name).shape, device="meta")

    def _unsummed(self, name: str) -> Tensor:
        """At home in all but sums."""
        if name not in self.freedoms.tensors:
            return self.moved(name)
        tensor = self.moved(name).double()
        if name in self.freedoms.position_biases:
            return tensor + (self._of_base(name) - tensor).mean(0)
        for norm in self.freedoms.norms:
            if name == norm.gain and norm.trades_gain:
                return (tensor + norm.offset) * self._gain(norm) - norm.offset
            if name == norm.bias:
                return self._of_base(name)
            if name == norm.scaled_bias:
                return tensor * self._gain(norm)
        if any(name == writer.layer_scale for writer in self.freedoms.writers):
            return tensor * self._layer_scale(name)
        if name in self.freedoms.reading:
            self._read(name, tensor)
        if name in self.freedoms.routers and self._is_comparable(name):
            tensor += (self._of_base(name) - tensor).mean(0)
        if name in self.freedoms.reader_of_bias:
            tensor -= self._constant(name)
        writer = self.freedoms.by_tensor.get(name)
        scale = self._scale_of(writer)
        if writer is not None:
            columns = along(tensor, writer.axis)
            columns /= scale
        self._take_from_output_bias(name, tensor)
        if writer is not None and writer.is_blind and self._is_comparable(name):
            _add_nearest(along(tensor, writer.axis), along(self._of_base(name), writer.axis), 1 / scale)
        places = [places for bias, places in self.freedoms.keys if name == bias]
        places += [value.value for value in self.freedoms.values if name == value.bias]
        for place in places:
            tensor[place.flatten()] = self._of_base(name)[place.flatten()]
        return tensor

    def _take_from_output_bias(self, name: str, tensor: Tensor) -> None:
        for value in self.freedoms.values:
            if name == value.output_bias:
                bias = self.tensor(value.bias)
                if value.bias in self.freedoms.reader_of_bias:
                    bias = bias + self._constant(value.bias)
                tensor -= of_values(value, self.tensor(value.block.output.weight), bias)
        for norm in self.freedoms.norms:
            if name == norm.output_bias and norm.bias is not None:
                tensor -= self._of_base(norm.bias)

    def _is_comparable(self, name: str) -> bool:
        return name in self.base.index.entries and self.base.spec(name).shape == self.spec(name).shape

    def _of_base(self, name: str) -> Tensor:
        """The base's tensor in float64; zeros where it has none."""
        if self._is_comparable(name):
            return self.base.tensor(name).double()
        return torch.zeros(self.spec(name).shape, dtype=torch.float64)

    def _constant(self, bias: str) -> Tensor:
        """What a reader makes of the base's bias of its norm."""
        norm, reader = self.freedoms.reader_of_bias[bias]
        if norm.bias is None:
            return torch.zeros(())
        return through(self.tensor(reader.weight), reader.axis, self._of_base(norm.bias).repeat(reader.copies))

    def _read(self, name: str, tensor: Tensor) -> None:
        norm, reader = self.freedoms.reading[name]
        gain = self.moved(norm.gain).double() + norm.offset
        scale = self._gain(norm) if norm.trades_gain else torch.ones_like(gain)
        gain = gain * scale
        base = self._of_base(name)
        for columns, theirs in zip(
            copies_of(tensor, reader, len(gain)), copies_of(base, reader, len(gain)), strict=True
        ):
            columns /= scale
            if norm.is_blind and bool((gain != 0).all()) and self._is_comparable(name):
                _add_nearest(columns, theirs, 1 / gain)

    def _gain(self, norm: NormFreedom) -> Tensor:
        """What to multiply the gain with, and divide the readers' columns by."""
        if norm.gain not in self._scales:
            ours = self.moved(norm.gain).double() + norm.offset
            theirs = self._of_base(norm.gain) + norm.offset
            pairs = [
                (columns, _seen(of_base, theirs) if norm.is_blind else of_base)
                for reader in norm.readers
                if self._is_comparable(reader.weight)
                for columns, of_base in zip(
                    copies_of(self.moved(reader.weight).double(), reader, len(ours)),
                    copies_of(self._of_base(reader.weight), reader, len(ours)),
                    strict=True,
                )
            ]
            self._scales[norm.gain] = _nearest_scale(ours, theirs, pairs)
        return self._scales[norm.gain]

    def _scale_of(self, writer: Writer | None) -> Tensor:
        if writer is None or writer.layer_scale is None:
            return torch.ones((), dtype=torch.float64)
        return self._layer_scale(writer.layer_scale)

    def _layer_scale(self, name: str) -> Tensor:
        if name not in self._scales:
            # Not by its bias, which holds other constants as well.
            writers = [writer for writer in self.freedoms.writers if writer.layer_scale == name and writer.is_matrix]
            theirs = self._of_base(name)
            pairs = [
                (
                    along(self.moved(item.tensor).double(), item.axis),
                    _seen(of_base, theirs) if item.is_blind else of_base,
                )
                for item in writers
                if self._is_comparable(item.tensor)
                for of_base in [along(self._of_base(item.tensor), item.axis)]
            ]
            self._scales[name] = _nearest_scale(self.moved(name).double(), theirs, pairs)
        return self._scales[name]


@dataclass(frozen=True)
class AsStored(DerivedSource):
    """``original``, which computes in a wider dtype, rounded once to the one it is stored in."""

    def tensor(self, name: str) -> Tensor:
        return self.original.tensor(name).to(torch_dtype(self.spec(name).dtype))


def _nearest_scale(ours: Tensor, theirs: Tensor, beside: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The a (of either sign) that minimises sum |W / a - W0|^2 for each of the last axis, |W|^2 / <W, W0>.

    Where the weights beside a scale do not resemble the base's, a brings the scale itself to the base's.
    """
    norms, base_norms, products = torch.zeros(3, len(ours), dtype=torch.float64)
    for weight, base in beside:
        norms += weight.square().reshape(-1, len(ours)).sum(0)
        base_norms += base.square().reshape(-1, len(ours)).sum(0)
        products += (weight * base).reshape(-1, len(ours)).sum(0)
    is_alike = products.square() > ALIKE**2 * norms * base_norms
    to_base = torch.where((ours == 0) | (theirs == 0), 1.0, theirs / torch.where(ours == 0, 1.0, ours))
    scale = torch.where(is_alike, norms / torch.where(is_alike, products, 1.0), to_base)
    return torch.where(ours == 0, 1.0, scale)


def _seen(rows: Tensor, scale: Tensor) -> Tensor:
    """``rows`` without what a norm that is blind to a common number does not see: as in neutral forms."""
    if not bool((scale != 0).all()):
        return rows
    return rows - (rows * scale).mean(-1, keepdim=True) / scale


def _add_nearest(ours: Tensor, theirs: Tensor, direction: Tensor) -> None:
    """To every row of ``ours`` the multiple of ``direction`` that brings it nearest to ``theirs``."""
    direction = direction.expand(ours.shape[-1])
    ours += ((theirs - ours) @ direction / direction.square().sum())[..., None] * direction
