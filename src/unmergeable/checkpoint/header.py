"""The header of one safetensors file: parsed with suspicion, built byte for byte as safetensors builds it.

A file is an 8-byte little-endian length N, N bytes of JSON, and the tensors' bytes back to back. Files come
from strangers, so everything the header claims is checked against the file before any of it is believed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import reading
from unmergeable.checkpoint.dtypes import ITEMSIZE, PACKED, SAVE_RANK
from unmergeable.errors import CheckpointError, shown

MAX_HEADER_BYTES = 100_000_000
"""The limit safetensors itself sets."""

_MAX_NAME = 1000
_MAX_RANK = 64  # numpy's limit, the lowest of the libraries that read these files
_MAX_DIMENSION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is: its safetensors dtype code (``"BF16"``) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.numel * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is: ``begin`` and ``end`` are byte offsets from the start of the file of ``shard``."""

    name: str
    spec: TensorSpec
    shard: str
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed header: ``nbytes`` of the file come before the first tensor; entries are in data order.

    ``metadata`` is None where the header has no ``__metadata__``, which differs in bytes from an empty one.
    """

    nbytes: int
    metadata: Mapping[str, str] | None
    entries: tuple[TensorEntry, ...]


def strict_json(text: bytes | str, where: str) -> Any:
    """JSON in which no object names a key twice, so that no two readers can understand it differently.

    Raises:
        CheckpointError: for text that is not JSON, is nested too deeply, or repeats a key.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(items)
        if len(parsed) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    raise CheckpointError(f"{where}: key {shown(key)} appears twice; the file is malformed.")
                seen.add(key)
        return parsed

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); download the file again.") from error


def read_header(path: Path, shard: str) -> Header:
    """Parse and check the header of the safetensors file at ``path``; ``shard`` names it in messages.

    Raises:
        CheckpointError: for a file that is truncated, longer than its header says, or malformed in any way.
    """
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if prefix == b"version ":
            raise CheckpointError(f"{shard}: a Git LFS pointer, not the weights; run `git lfs pull` in {path.parent}.")
        length = int.from_bytes(prefix, "little")
        if len(prefix) == 8 and length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{shard}: promises a header of {length:,} bytes (the limit is {MAX_HEADER_BYTES:,}); "
                "not a safetensors file, or a damaged one."
            )
        if len(prefix) < 8 or 8 + length > size:
            promised = 8 if len(prefix) < 8 else 8 + length
            raise CheckpointError(
                f"truncated shard: {shard} is {size:,} bytes, its header alone takes {promised:,}; download it again."
            )
        raw = file.read(length)
    return parse_header(raw, shard, size)


def parse_header(raw: bytes, shard: str, file_size: int) -> Header:
    """Parse the JSON of a header and check every claim in it against a file of ``file_size`` bytes.

    Raises:
        CheckpointError: naming the shard and, where there is one, the tensor.
    """
    where = f"header of {shard}"
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: does not start with '{{'; not a safetensors file, or a damaged one.")
    parsed = strict_json(raw, where)
    metadata = parsed.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{where}: __metadata__ must map text to text; the file is malformed.")

    start = 8 + len(raw)
    entries = [_parse_entry(name, value, shard, start) for name, value in parsed.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _require_contiguous(entries, shard, start)
    promised = entries[-1].end if entries else start
    if file_size < promised:
        raise CheckpointError(
            f"truncated shard: {shard} is {file_size:,} bytes, its header promises {promised:,}; download it again."
        )
    if file_size > promised:
        raise CheckpointError(
            f"{shard}: {file_size - promised:,} bytes follow the last tensor; the file is malformed, download it again."
        )
    return Header(start, metadata, tuple(entries))


def _parse_entry(name: str, value: Any, shard: str, start: int) -> TensorEntry:
    where = f"{shard}: tensor {shown(name)}"
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f"{where}: an empty name, unprintable characters, or more than {_MAX_NAME}; the file is malformed."
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets; the file is malformed.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if isinstance(dtype, str) and dtype in PACKED:
        raise CheckpointError(f"{where}: dtype {dtype}: already quantised; pass the original checkpoint.")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(ITEMSIZE)}.")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK or any(dimension > _MAX_DIMENSION for dimension in shape):
        raise CheckpointError(f"{where}: shape {shown(shape)} is not a list of sizes; the file is malformed.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)} are no extent; the file is malformed.")
    spec = TensorSpec(dtype, tuple(shape))
    begin, end = offsets
    if spec.nbytes != end - begin:
        raise CheckpointError(
            f"{where}: {spec} takes {spec.nbytes:,} bytes, its data_offsets span {end - begin:,}; "
            "the file is malformed."
        )
    return TensorEntry(name, spec, shard, start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    """Whether ``value`` is a list of non-negative integers (JSON's true and false are not)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _require_contiguous(entries: Sequence[TensorEntry], shard: str, start: int) -> None:
    """Holes could carry anything, overlaps alias two tensors: safetensors forbids both."""
    position = start
    for entry in entries:
        if entry.begin < position:
            raise CheckpointError(f"{shard}: tensor {entry.name!r} overlaps the one before it; the file is malformed.")
        if entry.begin > position:
            raise CheckpointError(
                f"{shard}: a hole of {entry.begin - position:,} bytes before tensor {entry.name!r}; "
                "the file is malformed."
            )
        position = entry.end


def build_header(tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str] | None) -> bytes:
    """Length prefix and header of a file that holds ``tensors`` in this order: the file's first bytes.

    Equal to what ``safetensors.save_file`` writes when the order is :func:`save_file_order` and the metadata
    has at most one key (with more, safetensors' own order varies from run to run).
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, spec in tensors:
        if name == "__metadata__" or name in header:
            raise CheckpointError(f"tensor {name!r} cannot be written: the name is taken in the same file.")
        end = position + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # safetensors keeps the first tensor 8-byte aligned
    return len(raw).to_bytes(8, "little") + raw


def save_file_order(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """The names in the order in which ``safetensors.save_file`` lays them out: dtype, then name."""
    return sorted(tensors, key=lambda name: (SAVE_RANK[tensors[name].dtype], name.encode()))


def raw_header(path: Path, nbytes: int) -> bytes:
    """The first ``nbytes`` of a file, as stored."""
    with reading(path) as file:
        return file.read(nbytes)
