"""Constants, gains, scales and unseen directions at random, in the shape of a checkpoint that is to take them over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unmergeable.checkpoint.source import DerivedSource
from unmergeable.gauge.additive import Freedoms
from unmergeable.randomness import Stream

BIAS = 2.0
"""Standard deviation of constants, in units of the larger of 1 and their own root mean square."""

GAIN = 0.6
"""Gains are multiplied by e^-0.6 to e^0.6, and layer scales by as much with a sign."""

UNSEEN = 2.0
"""Root mean square of what no norm sees, relative to the tensor's own."""


TRADES: Mapping[str, Callable[[Freedoms], Iterable[str | None]]] = {
    "value_bias": lambda freedoms: (value.bias for value in freedoms.values),
    "key_bias": lambda freedoms: (name for name, _ in freedoms.keys),
    "norm_bias": lambda freedoms: (norm.bias for norm in freedoms.norms),
    "norm_gain": lambda freedoms: (norm.gain for norm in freedoms.norms if norm.trades_gain),
    "layer_scale": lambda freedoms: (writer.layer_scale for writer in freedoms.writers),
    "unseen_reading": lambda freedoms: (r.weight for norm in freedoms.norms if norm.is_blind for r in norm.readers),
    "unseen_writing": lambda freedoms: (writer.tensor for writer in freedoms.writers if writer.is_blind),
    "router": lambda freedoms: freedoms.routers,
    "summed_rows": lambda freedoms: sorted(freedoms.summed),
    "position_bias": lambda freedoms: freedoms.position_biases,
}
"""Every kind of trade, with the tensors that say what is traded; those beside them follow."""


@dataclass(frozen=True)
class Drawn(DerivedSource):
    """``original`` with random numbers in ``changed``, all of which ``freedoms`` lets it take over; float64."""

    freedoms: Freedoms
    stream: Stream
    changed: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        own = self.original.tensor(name).double()
        if name not in self.changed:
            return own
        drawn = self.stream.child(name)
        for norm in self.freedoms.norms:
            if name == norm.gain:
                return (own + norm.offset) * _factors(len(own), drawn) - norm.offset
        if any(name == writer.layer_scale for writer in self.freedoms.writers):
            return own * _factors(len(own), drawn) * torch.from_numpy(drawn.child("sign").signs(len(own)))
        size = float(own.square().mean().sqrt())
        added = torch.zeros(own.shape[-1], dtype=torch.float64)
        if name in self.freedoms.summed:
            added = BIAS * max(1.0, size) * torch.from_numpy(drawn.child("sum").normal(own.shape[-1]))
            if name not in self.freedoms.by_tensor:
                return own + added
        if own.dim() == 1:
            return own + added + BIAS * max(1.0, size) * torch.from_numpy(drawn.normal(len(own)))
        # Alike along the axis that a norm sees, hence all of it unseen; across that axis anything.
        shape = list(own.shape)
        shape[self._axis(name)] = 1
        return (UNSEEN * size * torch.from_numpy(drawn.normal(*shape))).expand(own.shape) + added

    def _axis(self, name: str) -> int:
        if name in self.freedoms.reading:
            return self.freedoms.reading[name][1].axis
        return self.freedoms.by_tensor[name].axis if name in self.freedoms.by_tensor else 0


def _factors(count: int, stream: Stream) -> Tensor:
    return torch.from_numpy(GAIN * (2 * stream.uniform(count) - 1)).exp()
