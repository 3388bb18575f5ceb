"""Tiny networks in memory, each built once, on first use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attacks.planted import Build, Network
from unmergeable.architecture import detect
from unmergeable.checkpoint.memory import MemorySource
from zoo import TOYS, write_toy


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Build:
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
