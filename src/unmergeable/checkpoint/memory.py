"""A checkpoint in memory: the same protocol as one in files, over a state dict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec, lay_out_virtual
from unmergeable.checkpoint.plan import OutputTensor
from unmergeable.checkpoint.source import IndexedSource, TensorSource, empty_tensor, tensor_bytes

SHARD = "model.safetensors"


@dataclass(frozen=True)
class MemorySource:
    """A ``TensorSource`` over tensors by their names on disk. Nothing exists under ``folder``: it names the source.

    A tensor that is read is a copy, as from a file; the state dict itself is never changed.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path("in-memory")

    @property
    def description(self) -> str:
        return str(self.folder)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.tensors)

    @cached_property
    def index(self) -> CheckpointIndex:
        """As of one file; its digest is that of names and values, since there is no header to take it from."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(name.encode())
            digest.update(tensor_bytes(tensor.cpu()))
        entries, shards = lay_out_virtual({SHARD: {name: self.spec(name) for name in self.names}}, {"format": "pt"})
        return CheckpointIndex(
            folder=self.folder,
            config_file=self.folder / "config.json",
            config=self.config,
            entries=entries,
            shards=shards,
            weights_index_file=None,
            weights_index=None,
            side_files={},
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
        return self.tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)


def written_in_memory(source: TensorSource, plan: Sequence[OutputTensor]) -> dict[str, torch.Tensor]:
    """What :func:`~unmergeable.checkpoint.rewrite.rewrite` would write for a plan, by name.

    Tensors that the plan copies from a :class:`MemorySource` are that source's own, not copies of them.
    """
    result: dict[str, torch.Tensor] = {}
    for tensor in plan:
        origin = tensor.origin or tensor.name
        if tensor.fill is not None:
            result[tensor.name], _ = empty_tensor(tensor.spec)
            tensor.fill(result[tensor.name])
        elif tensor.edit is not None:
            result[tensor.name] = tensor.edit(source.tensor(origin))
        elif isinstance(source, MemorySource):
            result[tensor.name] = source.tensors[origin]
        else:
            result[tensor.name] = source.tensor(origin)
    return result
