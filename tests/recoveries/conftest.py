"""Tiny networks as base, expert and protected checkpoint in memory. Built once per family, on first use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from memory_source import MemorySource
from safetensors.torch import load_file
from zoo import TOYS, write_toy

from unmergeable.architecture import Architecture, detect
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


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Network]:
    @cache
    def build(name: str, seed: int = 0) -> Network:
        folder = write_toy(TOYS[name], tmp_path_factory.mktemp(name), seed=seed)
        tensors = load_file(next(folder.glob("*.safetensors")))
        config = json.loads((folder / "config.json").read_text())
        architecture = detect(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        return Network(name, folder, MemorySource(tensors, config, Path("base")), architecture)

    return build


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
