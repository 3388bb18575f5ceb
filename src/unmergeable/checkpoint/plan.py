"""What a rewrite is to produce: a list of tensors, and the exact layout of the files that hold them.

Pure: reads indexes and small files, writes nothing. Everything that can be wrong with a plan is found here, before
the first byte is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from unmergeable.checkpoint.disk import read_file
from unmergeable.checkpoint.header import TensorSpec, build_header, raw_header
from unmergeable.checkpoint.index import CheckpointIndex, require_shard_name
from unmergeable.checkpoint.listing import CONFIG_NAME
from unmergeable.checkpoint.pipeline import Job
from unmergeable.checkpoint.source import StoredSource, TensorSource
from unmergeable.errors import UsageError


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result, in the file ``shard``.

    ``edit`` is given the source's tensor ``origin`` (its own to change in place) and returns the result; ``fill``
    is given the uninitialised result to write all of it, and may read whatever it likes, but must not keep it; with
    neither, the bytes of ``origin`` are copied unchanged. ``origin`` is ``name`` unless the tensor is renamed. Both run
    in worker threads.
    """

    name: str
    spec: TensorSpec
    shard: str
    fill: Callable[[torch.Tensor], object] | None = None
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None
    origin: str | None = None


def output_like(
    source: TensorSource,
    edits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    *,
    drop: Collection[str] = (),
    extra: Sequence[OutputTensor] = (),
) -> tuple[OutputTensor, ...]:
    """The plan of a result with the source's names, specs, shards and order.

    Args:
        source: what is copied.
        edits: by tensor name, a function from the stored tensor (its own, to change in place if it likes) to one
            of the same shape and dtype.
        drop: tensors to leave out.
        extra: tensors to add, each at the end of its shard.

    Raises:
        CheckpointError: when ``edits`` or ``drop`` name a tensor the source does not hold.
    """
    for name in (*edits, *drop):
        source.spec(name)
    by_shard: dict[str, list[OutputTensor]] = {}
    for name, entry in source.index.entries.items():
        if name not in drop:
            by_shard.setdefault(entry.shard, []).append(
                OutputTensor(name, entry.spec, entry.shard, edit=edits.get(name))
            )
    for tensor in extra:
        by_shard.setdefault(tensor.shard, []).append(tensor)
    return tuple(tensor for shard in by_shard.values() for tensor in shard)


@dataclass(frozen=True)
class ShardLayout:
    """One file of the result: its first bytes, and the jobs with the offset at which each one's bytes begin."""

    name: str
    header: bytes
    jobs: tuple[Job, ...]
    begins: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Layout:
    """Shards and small files (name and bytes) of the result; ``nbytes`` counts its side files too."""

    shards: tuple[ShardLayout, ...]
    small_files: tuple[tuple[str, bytes], ...]
    nbytes: int


def lay_out(source: TensorSource, plan: Sequence[OutputTensor], config_changes: Mapping[str, Any] | None) -> Layout:
    """Fix every byte of the result that does not depend on tensor values.

    Raises:
        UsageError: for a plan that is empty, names a tensor twice, or scatters a shard.
        CheckpointError: for a tensor the source does not hold, or an unsafe shard name.
    """
    plan = tuple(plan)
    _require_valid(source, plan)
    shards = tuple(
        _lay_out_shard(source, name, tuple(tensors)) for name, tensors in groupby(plan, key=lambda tensor: tensor.shard)
    )
    config = read_file(source.index.config_file)
    changes = _merged(source.index.config_changes, config_changes or {})
    small = [(CONFIG_NAME, edit_json(config, changes) if changes or config_changes is not None else config)]
    weights_index = _weights_index(source.index, plan)
    if weights_index is not None:
        small.append(weights_index)
    copied = sum(path.stat().st_size for path in source.index.side_files.values())
    nbytes = sum(shard.size for shard in shards) + sum(len(data) for _, data in small) + copied
    return Layout(shards, tuple(small), nbytes)


def _require_valid(source: TensorSource, plan: tuple[OutputTensor, ...]) -> None:
    if not plan:
        raise UsageError("the plan of the result is empty: nothing to write.")
    names: set[str] = set()
    for tensor in plan:
        if tensor.name in names:
            raise UsageError(f"the plan holds tensor {tensor.name!r} twice.")
        names.add(tensor.name)
        if tensor.fill is not None and (tensor.edit is not None or tensor.origin is not None):
            raise UsageError(f"the plan makes tensor {tensor.name!r} from nothing and from the source at once.")
        if tensor.fill is None:
            stored = source.spec(tensor.origin or tensor.name)
            if tensor.edit is None and stored != tensor.spec:
                raise UsageError(f"the plan copies tensor {tensor.name!r} as {tensor.spec}, but it is {stored}.")
    shards: set[str] = set()
    for shard, _ in groupby(plan, key=lambda tensor: tensor.shard):
        require_shard_name(shard, "the plan")
        if shard in shards:
            raise UsageError(f"the plan scatters the tensors of {shard}: list them together.")
        shards.add(shard)


def _lay_out_shard(source: TensorSource, name: str, tensors: tuple[OutputTensor, ...]) -> ShardLayout:
    specs = [(tensor.name, tensor.spec) for tensor in tensors]
    shard = source.index.shards.get(name)
    if (
        shard is not None
        and shard.path is not None
        and specs == [(member, source.index.entries[member].spec) for member in shard.tensors]
    ):
        # The stored header, not an equal one: another writer's spacing and key order survive.
        header = raw_header(shard.path, shard.header_bytes)
    else:
        header = build_header(specs, {"format": "pt"} if shard is None else shard.metadata)
    begins = []
    position = len(header)
    for _, spec in specs:
        begins.append(position)
        position += spec.nbytes
    jobs = tuple(_job(source, tensor, begin) for tensor, begin in zip(tensors, begins, strict=True))
    return ShardLayout(name, header, jobs, tuple(begins), position)


def _job(source: TensorSource, tensor: OutputTensor, begin: int) -> Job:
    if tensor.fill is not None:
        return Job(tensor.name, tensor.spec, tensor.spec, fill=tensor.fill, begin=begin)
    origin = tensor.origin or tensor.name
    stored = source.spec(origin)
    extent = source.stored(origin) if isinstance(source, StoredSource) else None
    if extent is not None:
        return Job(tensor.name, tensor.spec, stored, extent=extent, edit=tensor.edit)
    return Job(tensor.name, tensor.spec, stored, read=lambda: source.tensor(origin), edit=tensor.edit)


def _weights_index(index: CheckpointIndex, plan: tuple[OutputTensor, ...]) -> tuple[str, bytes] | None:
    """Name and bytes of ``*.safetensors.index.json``: the source's own while it still tells the truth."""
    weight_map = {tensor.name: tensor.shard for tensor in plan}
    shards = dict.fromkeys(weight_map.values())
    if index.weights_index_file is None and len(shards) == 1:
        return None
    specs = {tensor.name: tensor.spec for tensor in plan}
    if (
        index.weights_index_file is not None
        and index.weights_index_name is not None
        and (specs, weight_map)
        == (
            {name: entry.spec for name, entry in index.entries.items()},
            {name: entry.shard for name, entry in index.entries.items()},
        )
    ):
        return index.weights_index_name, read_file(index.weights_index_file)
    metadata = dict((index.weights_index or {}).get("metadata") or {})
    if index.weights_index_file is None or "total_parameters" in metadata:
        metadata["total_parameters"] = sum(spec.numel for spec in specs.values())
    metadata["total_size"] = sum(spec.nbytes for spec in specs.values())
    name = index.weights_index_name or _stem(next(iter(shards))) + ".safetensors.index.json"
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return name, text.encode()


def _stem(shard: str) -> str:
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", shard)


def edit_json(text: bytes, changes: Mapping[str, Any]) -> bytes:
    """Change a JSON object and keep the rest: order of keys, indentation, final newline.

    Nested mappings are merged key by key; any other value replaces what was there.
    """
    original = text.decode()
    indent = re.match(r"\{\s*\n([ \t]*)", original)
    merged = _merged(json.loads(original), changes)
    edited = json.dumps(merged, indent=indent.group(1) if indent else None, ensure_ascii=original.isascii())
    return (edited + original[len(original.rstrip()) :]).encode()


def _merged(old: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged
