"""What the hidden units of every feed-forward see: range, mean and variance of the activation function's input.

One pass over the data, each batch reduced as it comes: memory is that of the network and one layer's activations,
whatever the amount of data. Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.linear_layers import linear_layers
from unmergeable.network.tasks import answer, device_of
from unmergeable.polynomials.rewriting import UnitRanges
from unmergeable.progress import Progress, silent


@torch.no_grad()
def activation_ranges(
    network: Any, architecture: Architecture, batches: Iterable[EncodedBatch], *, progress: Progress = silent
) -> dict[str, UnitRanges]:
    """Ranges by the name of the feed-forward, from one pass of ``batches`` through ``network``.

    Raises:
        BadInput: there are no batches, the network does not take them (texts lack what a decoder beside an encoder
            reads), activations are not finite, or a layer is not a tensor of its own.
    """
    wanted = {(block.gate or block.up).weight: block.name for block in architecture.feed_forwards}
    layers = {wanted[layer.name]: layer.module for layer in linear_layers(network) if layer.name in wanted}
    for weight, name in wanted.items():
        if name not in layers:
            raise BadInput(f"tensor {weight} is no layer of the live network: its activations cannot be watched.")
    watched = {name: _Running() for name in layers}
    device, seen = device_of(network), 0
    for batch in batches:
        moved = batch.to(device)
        with ExitStack() as hooks:
            for name, module in layers.items():
                hooks.callback(module.register_forward_hook(partial(_watch, watched[name], moved)).remove)
            answer(network, moved)
        seen += len(batch)
        progress("ranges of hidden units", seen, seen, "examples")
    if seen == 0:
        raise BadInput("no examples to calibrate on; give data that has some.")
    return {name: running.ranges(name) for name, running in watched.items()}


def _watch(running: _Running, batch: EncodedBatch, module: Any, arguments: Any, output: Tensor) -> None:
    running.add(batch.visible(output))


class _Running:
    """Range and moments so far; means are merged, not sums of squares, which would cancel."""

    def __init__(self) -> None:
        self.count = 0
        self.low = self.high = self.mean = self.squares = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in ``values`` [inputs, units]."""
        if not len(values):
            return
        values = values.to(torch.float64).cpu()
        mean = values.mean(0)
        squares = ((values - mean) ** 2).sum(0)
        low, high = values.amin(0), values.amax(0)
        if not self.count:
            self.count, self.low, self.high, self.mean, self.squares = len(values), low, high, mean, squares
            return
        total = self.count + len(values)
        apart = mean - self.mean
        self.squares = self.squares + squares + apart**2 * (self.count * len(values) / total)
        self.mean = self.mean + apart * (len(values) / total)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count = total

    def ranges(self, name: str) -> UnitRanges:
        """Raises BadInput, naming the feed-forward, when nothing was seen or it is not finite."""
        if not self.count or not bool(torch.isfinite(self.squares).all()):
            raise BadInput(
                f"feed-forward {name}: no finite activations were seen; calibrate in float32 on its own task."
            )
        return UnitRanges(self.low, self.high, self.mean, self.squares / self.count, self.count)
