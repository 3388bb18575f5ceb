"""Where tensors come from: one protocol for safetensors folders, adapters on a base, and pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec
from unmergeable.errors import CheckpointError, Mismatch


class TensorSource(Protocol):
    """A checkpoint whose tensors are read one at a time, by their names on disk.

    Reading is safe from several threads at once.
    """

    @property
    def folder(self) -> Path:
        """The folder the source was opened from."""
        ...

    @property
    def description(self) -> str:
        """How messages name this source."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed ``config.json``."""
        ...

    @property
    def index(self) -> CheckpointIndex:
        """Layout: shards, order, side files. For an adapter or a pickle, of the checkpoint it is equal to."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Every tensor, in on-disk order."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, without reading it; CheckpointError for an unknown name."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU; contiguous, writable, and the caller's own."""
        ...


class IndexedSource:
    """A source whose layout is an index; a subclass says how a tensor is read."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._names = tuple(index.entries)

    @property
    def folder(self) -> Path:
        return self._index.folder

    @property
    def description(self) -> str:
        return str(self._index.folder)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._index.config

    @property
    def index(self) -> CheckpointIndex:
        return self._index

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """The spec of a tensor.

        Raises:
            CheckpointError: for a name the checkpoint does not hold.
        """
        entry = self._index.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.description} has no tensor {name!r}; `inspect` lists the ones it has.")
        return entry.spec


@dataclass(frozen=True)
class DerivedSource:
    """A source that is ``original`` but for what a subclass says differently."""

    original: TensorSource

    @property
    def folder(self) -> Path:
        return self.original.folder

    @property
    def description(self) -> str:
        return self.original.description

    @property
    def config(self) -> Mapping[str, Any]:
        return self.original.config

    @property
    def index(self) -> CheckpointIndex:
        return self.original.index

    @property
    def names(self) -> Sequence[str]:
        return self.original.names

    def spec(self, name: str) -> TensorSpec:
        return self.original.spec(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self.original.tensor(name)


@dataclass(frozen=True)
class RenamedSource(DerivedSource):
    """A checkpoint under other tensor names: a base saved without the ``bert.`` prefix its fine-tune carries."""

    original_name: Mapping[str, str]

    @property
    def names(self) -> Sequence[str]:
        return list(self.original_name)

    def spec(self, name: str) -> TensorSpec:
        return self.original.spec(self.original_name.get(name, name))

    def tensor(self, name: str) -> torch.Tensor:
        return self.original.tensor(self.original_name.get(name, name))


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes ``begin`` to ``end`` of a file."""

    path: Path
    begin: int
    end: int


@runtime_checkable
class StoredSource(Protocol):
    """A source that knows where a tensor's bytes lie unchanged in a file, so that copying never holds a tensor."""

    def stored(self, name: str) -> Extent | None:
        """The bytes of the tensor in its stored dtype; None where it has to be computed."""
        ...


@runtime_checkable
class ChunkSource(Protocol):
    """A source that reads a tensor's stored bytes piece by piece, so that nobody has to hold the tensor."""

    def raw_chunks(
        self, name: str, chunk_bytes: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[memoryview]:
        """The bytes from ``start`` to ``stop`` in order; each piece is valid until the next one is asked for."""
        ...


def shapes_of(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name and in on-disk order."""
    return {name: source.spec(name).shape for name in source.names}


def require_same_tensors(first: TensorSource, second: TensorSource, what: str, *, dtypes: bool = False) -> None:
    """Require two checkpoints to hold tensors of the same names and shapes (and, if asked, dtypes).

    ``what`` says in the message why they must agree, e.g. ``"base and expert"``.

    Raises:
        Mismatch: naming the first tensor, in on-disk order, that differs.
    """
    for name in first.names:
        if name not in second.index.entries:
            raise Mismatch(f"{what}: tensor {name!r} is in {first.description} but not in {second.description}.")
        ours, theirs = first.spec(name), second.spec(name)
        if ours.shape != theirs.shape or (dtypes and ours.dtype != theirs.dtype):
            raise Mismatch(
                f"{what}: tensor {name!r} is {ours} in {first.description} but {theirs} in {second.description}."
            )
    for name in second.names:
        if name not in first.index.entries:
            raise Mismatch(f"{what}: tensor {name!r} is in {second.description} but not in {first.description}.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The stored bytes of a CPU tensor, without a copy if it is contiguous. The view keeps the tensor alive."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def empty_tensor(spec: TensorSpec) -> tuple[torch.Tensor, memoryview]:
    """An uninitialised tensor of this spec, and its bytes to be filled in."""
    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    return tensor, tensor_bytes(tensor)
