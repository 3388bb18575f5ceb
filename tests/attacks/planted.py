"""A tiny random network as base, expert and protected checkpoint, all in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from unmergeable.architecture import Architecture
from unmergeable.attacks.distance import PartName, block_distances, relative_distance
from unmergeable.attacks.reading import Reader
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Monomial
from unmergeable.gauge.gauge import Gauge, fixed_gauge, sampled_gauge
from unmergeable.protections.mergelock import MergeLock
from unmergeable.randomness import Stream


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

    def transformed(self, source: MemorySource, *gauges: Gauge) -> MemorySource:
        """``source`` under ``gauges``, rounded to its stored dtype."""
        tensors = transform_all(source.tensors, self.architecture.symmetry, gauges)
        return MemorySource(tensors, source.config, Path("transformed"))

    def locked(self, source: MemorySource, condition: float, seed: int = 3) -> MemorySource:
        """``source`` protected by MergeLock."""
        gauge = MergeLock(condition=condition).gauge(self.architecture, Stream.from_seed(seed))
        return self.transformed(source, gauge)

    def key(self, condition: float, seed: int = 3) -> Gauge:
        """A secret element of every group inside the blocks: orders and bases of heads, units and experts."""
        spaces = self.architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
        return sampled_gauge(spaces, Stream.from_seed(seed), condition)

    def stream_key(self, source: MemorySource, condition: float, seed: int = 3) -> tuple[Gauge, ...]:
        """Secret elements of the residual stream and of the gains of its norms, the largest there are for ``source``.

        Where rotations are allowed, gains are folded away, and stay so; elsewhere they are moved at random.
        """
        symmetry, stream = self.architecture.symmetry, Stream.from_seed(seed)
        streams = symmetry.select("residual", folding=True)
        rotations = {name: space for name, space in streams.items() if space.folded}
        if not rotations:
            return (sampled_gauge({**symmetry.select("norm"), **streams}, stream, condition),)
        reader = Reader(source, symmetry)
        gains = {
            norm.space: Monomial(
                torch.arange(residual.size)[None], 1 / (reader([norm.gain])[norm.gain] + norm.offset)[None]
            )
            for residual in self.architecture.residuals
            for norm in residual.norms
        }
        return fixed_gauge(symmetry.spaces, gains), sampled_gauge(rotations, stream, condition)

    def distance(self, source: MemorySource, *names: PartName) -> float:
        """Relative Frobenius distance to the base over the named parts of all blocks, all parts if none is named."""
        distances = block_distances(source, self.base, self.architecture)
        return relative_distance(distance for distance in distances if not names or distance.part in names)

    def whole_distance(self, source: MemorySource) -> float:
        """The same over every tensor, embeddings and norms included."""
        pairs = [(source.tensors[name].double(), base.double()) for name, base in self.base.tensors.items()]
        away = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs)
        return math.sqrt(away / sum(float(theirs.square().sum()) for _, theirs in pairs))

    def attention_distance(self, source: MemorySource) -> float:
        return self.distance(source, "query_key", "value_output")


Build = Callable[..., Network]
"""``network(name, seed=0)``: the fixture of conftest.py."""
