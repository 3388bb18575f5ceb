"""What a rewrite is to produce: a list of tensors, and the exact layout of the files that hold them.

Pure: reads indexes and small files, writes nothing. Everything that can be wrong with a plan is found here, before
the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from unmergeable.checkpoint.disk import read_file
from unmergeable.checkpoint.header import TensorSpec, build_header, raw_header
from unmergeable.checkpoint.index import CheckpointIndex, require_shard_name
from unmergeable.checkpoint.listing import CONFIG_NAME
from unmergeable.checkpoint.pipeline import Job
from unmergeable.checkpoint.quantised import without
from unmergeable.checkpoint.source import StoredSource, TensorSource
from unmergeable.errors import UsageError


class Whole(dict[str, Any]):
    """A nested object of a config that stands in the place of the old one; others are merged into it key by key."""


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

    def fingerprint(self, resume_token: str, headers_digests: Sequence[str]) -> str:
        """What is written from sources with these digests: SHA-256 in hex over all that does not depend on values."""
        digest = hashlib.sha256(json.dumps([resume_token, headers_digests]).encode())
        for shard in self.shards:
            kinds = [job.extent is not None and job.edit is None for job in shard.jobs]
            digest.update(json.dumps([shard.name, kinds]).encode() + shard.header)
        return digest.hexdigest()


def lay_out(
    source: TensorSource,
    plan: Sequence[OutputTensor],
    config_changes: Mapping[str, Any] | None,
    *,
    side_files: Mapping[str, Path] | None = None,
    written: Mapping[str, bytes] | None = None,
) -> Layout:
    """Fix every byte of the result that does not depend on tensor values.

    ``side_files`` are copied beside the weights (None: the source's); ``written`` are further small files.

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
    changes, stale = _merged(source.index.config_changes, config_changes or {}), source.index.stale_settings
    is_changed = changes or stale or config_changes is not None
    small = [(CONFIG_NAME, edit_json(config, changes, drop=stale) if is_changed else config)]
    weights_index = _weights_index(source.index, plan)
    if weights_index is not None:
        small.append(weights_index)
    small += (written or {}).items()
    beside = source.index.side_files if side_files is None else side_files
    copied = sum(path.stat().st_size for path in beside.values())
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
        and not source.index.names_on_disk
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
    parameters, nbytes = (sum(getattr(spec, size) for spec in specs.values()) for size in ("numel", "nbytes"))
    if (
        index.weights_index_file is not None
        and index.weights_index_name is not None
        and index.weights_index is not None
        and _still_true(index.weights_index, weight_map, parameters, nbytes)
    ):
        return index.weights_index_name, read_file(index.weights_index_file)
    metadata = dict(_metadata(index.weights_index))
    if index.weights_index_file is None or "total_parameters" in metadata:
        metadata["total_parameters"] = parameters
    metadata["total_size"] = nbytes
    name = index.weights_index_name or _stem(next(iter(shards))) + ".safetensors.index.json"
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return name, text.encode()


def _still_true(weights_index: Mapping[str, Any], weight_map: Mapping[str, str], parameters: int, nbytes: int) -> bool:
    """Whether an index says of the result what is so; loaders spread a model over devices by its sizes."""
    said = _metadata(weights_index)
    return (
        weights_index.get("weight_map") == weight_map
        and said.get("total_size") == nbytes
        and said.get("total_parameters", parameters) == parameters
    )


def _metadata(weights_index: Mapping[str, Any] | None) -> Mapping[str, Any]:
    metadata = (weights_index or {}).get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


def _stem(shard: str) -> str:
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", shard)


def edit_json(text: bytes, changes: Mapping[str, Any], *, drop: Collection[str] = ()) -> bytes:
    """Change a JSON object and keep the rest: order of keys, indentation, final newline.

    Nested mappings are merged key by key; any other value replaces what was there. ``drop`` names entries to leave out,
    those of nested objects as ``part.entry``.
    """
    original = text.decode()
    indent = re.match(r"\{\s*\n([ \t]*)", original)
    merged = _merged(without(json.loads(original), drop), changes)
    edited = json.dumps(merged, indent=indent.group(1) if indent else None, ensure_ascii=original.isascii())
    return (edited + original[len(original.rstrip()) :]).encode()


def _merged(old: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in changes.items():
        is_part = isinstance(value, Mapping) and not isinstance(value, Whole)
        merged[key] = _merged(merged.get(key), value) if is_part else value
    return merged
