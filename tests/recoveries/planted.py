"""A tiny random network as base, expert and protected checkpoint, all in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from memory_source import MemorySource
from unmergeable.architecture import Architecture
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.gauge import Gauge
from unmergeable.protections.mergelock import MergeLock
from unmergeable.randomness import Stream
from unmergeable.recoveries.distance import block_distances, relative_distance


@dataclass(frozen=True)
class Network:
    """A random network of one family: what is on disk in ``folder``, and the same in memory."""

    name: str
    folder: Path
    base: MemorySource
    architecture: Architecture

    def expert(self, share: float) -> MemorySource:
        """The base plus a random task vector of ``share`` times its norm, tensor by tensor, in float32."""
        generator = torch.Generator().manual_seed(5)
        tensors = {}
        for name, tensor in self.base.tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + noise * (share * tensor.norm() / noise.norm())
        return MemorySource(tensors, self.base.config, Path("expert"))

    def transformed(self, source: MemorySource, gauge: Gauge) -> MemorySource:
        """``source`` under ``gauge``, rounded to its stored dtype."""
        tensors = transform_all(source.tensors, self.architecture.symmetry, [gauge])
        return MemorySource(tensors, source.config, Path("transformed"))

    def locked(self, source: MemorySource, condition: float, seed: int = 3) -> MemorySource:
        """``source`` protected by MergeLock."""
        gauge = MergeLock(condition=condition).gauge(self.architecture, Stream.from_seed(seed))
        return self.transformed(source, gauge)

    def attention_distance(self, source: MemorySource) -> float:
        """Relative Frobenius distance to the base over all attention weights."""
        distances = block_distances(source, self.base, self.architecture)
        return relative_distance(distance for distance in distances if distance.part != "feed_forward")


Build = Callable[..., Network]
"""``network(name, seed=0)``: the fixture of conftest.py."""
