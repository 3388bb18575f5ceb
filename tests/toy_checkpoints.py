"""The networks of the zoo as their files hold them: config, tensors by on-disk name, architecture. Each built once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unmergeable.architecture import Architecture, detect
from zoo import TOYS, write_toy


@dataclass(frozen=True)
class ToyCheckpoint:
    """A random float32 network. The tensors are shared between tests: copy before changing one."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    architecture: Architecture

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


@cache
def toy_checkpoint(name: str) -> ToyCheckpoint:
    with tempfile.TemporaryDirectory() as place:
        folder = write_toy(TOYS[name], Path(place))
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        config = json.loads((folder / "config.json").read_text())
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return ToyCheckpoint(config, tensors, detect(config, shapes))
