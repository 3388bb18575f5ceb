"""What protections that train have in common: the trained weights as a checkpoint, and the name of a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.source import DerivedSource, TensorSource, tensor_bytes
from unmergeable.network.encoding import EncodedBatch

_BLOCK = re.compile(r"(?:.+?\.)?\d+(?=\.)")
"""A tensor's name up to its first number: the repeated block it lies in."""


def training_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def block_of(name: str) -> str | None:
    """The numbered block a tensor lies in (``model.layers.3``), None outside of all."""
    found = _BLOCK.match(name)
    return found.group() if found else None


def numbered_blocks(architecture: Architecture) -> frozenset[str]:
    """The blocks that hold attention or a feed-forward."""
    body = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    return frozenset(filter(None, map(block_of, architecture.symmetry.tensors_of(body))))


@dataclass(frozen=True)
class TrainedSource(DerivedSource):
    """The expert, but for the tensors that ``file`` (safetensors) holds under the same names."""

    file: Path

    @cached_property
    def _trained(self) -> frozenset[str]:
        with safe_open(self.file, "pt") as stored:
            return frozenset(stored.keys())

    def tensor(self, name: str) -> Tensor:
        if name not in self._trained:
            return self.original.tensor(name)
        with safe_open(self.file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor


def job_token(recipe: Mapping[str, Any], sources: Sequence[TensorSource], batches: Iterable[EncodedBatch]) -> str:
    """Names a run by its recipe, checkpoints and every example: only the same one goes on from what was kept."""
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for source in sources:
        digest.update(f"{source.index.headers_digest} {source.index.states}".encode())
    for batch in batches:
        labels = {} if batch.labels is None else {"labels": batch.labels}
        for name, tensor in sorted({**batch.inputs, **labels}.items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
