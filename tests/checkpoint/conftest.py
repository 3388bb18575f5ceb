"""Checkpoint folders to read, spoil and rewrite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

WriteFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_single(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    name: str = "model.safetensors",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy"}, indent=2) + "\n")
    save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    return folder


def write_sharded(
    folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], *, index: str = "model.safetensors.index.json"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}, indent=2) + "\n")
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / index).write_text(text + "\n")
    return folder


def random_tensors(count: int, shape: tuple[int, ...] = (40, 30), prefix: str = "w") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {f"{prefix}{n:02}.weight": torch.randn(shape, generator=generator).bfloat16() for n in range(count)}


@pytest.fixture(scope="session")
def single() -> WriteFolder:
    return write_single


@pytest.fixture(scope="session")
def sharded() -> WriteFolder:
    return write_sharded


@pytest.fixture(scope="session")
def tensors() -> Callable[..., dict[str, torch.Tensor]]:
    return random_tensors


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    """Two shards, an index, a tokenizer, and a file that must not be copied."""
    folder = write_sharded(
        tmp_path / "source",
        {
            "model-00001-of-00002.safetensors": random_tensors(5) | {"empty": torch.zeros(0, 3)},
            "model-00002-of-00002.safetensors": random_tensors(4, prefix="v") | {"scale": torch.tensor(2.5)},
        },
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"unprotected")
    return folder
