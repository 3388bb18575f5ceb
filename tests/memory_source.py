"""A checkpoint that exists only in memory, for tests that need no files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.index import CheckpointIndex, Shard, TensorEntry, TensorSpec
from unmergeable.checkpoint.source import IndexedSource, tensor_bytes

SHARD = "model.safetensors"


@dataclass(frozen=True)
class MemorySource:
    """A ``TensorSource`` over a dict of tensors. Nothing exists under ``folder``: it only names the source."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path("in-memory")

    @property
    def description(self) -> str:
        return str(self.folder)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.tensors)

    @property
    def index(self) -> CheckpointIndex:
        entries: dict[str, TensorEntry] = {}
        position = 0
        for name, tensor in self.tensors.items():
            spec = TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape))
            entries[name] = TensorEntry(name, spec, SHARD, position, position + spec.nbytes)
            position += spec.nbytes
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(name.encode())
            digest.update(tensor_bytes(tensor))
        return CheckpointIndex(
            folder=self.folder,
            config_file=self.folder / "config.json",
            config=self.config,
            entries=entries,
            shards={SHARD: Shard(SHARD, None, position, 0, {"format": "pt"}, tuple(entries))},
            weights_index_file=None,
            weights_index=None,
            side_files=(),
            left_out=(),
            headers_digest=digest.hexdigest(),
        )

    def spec(self, name: str) -> TensorSpec:
        if name not in self.tensors:
            IndexedSource(self.index).spec(name)  # raises the error of a real source
        tensor = self.tensors[name]
        return TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape))

    def tensor(self, name: str) -> torch.Tensor:
        self.spec(name)
        return self.tensors[name].detach().clone().contiguous()
