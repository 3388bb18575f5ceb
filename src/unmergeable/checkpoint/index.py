"""What a checkpoint folder holds, from the headers of its files alone.

Reading an index costs kilobytes however large the checkpoint, and loads no torch. Everything that can be known
to be wrong before the first tensor is read is refused here: damaged files, shard names that leave the folder,
pickles, pipelines, adapters, quantised weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import reading
from unmergeable.checkpoint.header import Header, TensorEntry, TensorSpec, build_header, read_header
from unmergeable.checkpoint.layouts import require_checkpoint, weights_of
from unmergeable.checkpoint.listing import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    FileState,
    Kind,
    LeftOut,
    Listing,
    list_folder,
)
from unmergeable.checkpoint.quantised import describe as describe_stale
from unmergeable.checkpoint.quantised import stale_settings, without
from unmergeable.checkpoint.spare import is_spare
from unmergeable.checkpoint.wrappers import describe as describe_wrapper
from unmergeable.checkpoint.wrappers import unwrapped_names
from unmergeable.errors import CheckpointError, shown

__all__ = [
    "CheckpointIndex",
    "LeftOut",
    "Shard",
    "TensorEntry",
    "TensorSpec",
    "content_digest",
    "identified",
    "is_adapter",
    "lay_out_virtual",
    "read_index",
    "repaired",
    "require_shard_name",
]

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")

_SHARDED_EMPTY = (0,)
"""The shape that DeepSpeed's ZeRO-3 leaves of a parameter whose values lie on other devices."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file. ``size`` and ``header_bytes`` (the bytes before the first tensor) are in bytes.

    ``path`` has links resolved; it is None where no such file exists yet (the source is an adapter, or pickled).
    ``tensors`` are names in data order; ``metadata`` is None where the header has none.
    """

    name: str
    path: Path | None
    size: int
    header_bytes: int
    metadata: Mapping[str, str] | None
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint folder without its tensors' values.

    ``entries`` are in on-disk order: shards by name, then data order. ``weights_index`` is the parsed
    ``*.safetensors.index.json`` (None for a single file). ``side_files`` (name to path) are copied byte for byte beside
    ``config_file`` and ``weights_index_file``. ``headers_digest`` identifies the checkpoint cheaply: SHA-256 over
    its configuration, index, headers, file sizes and modification times (not over its tensors). ``other_files``
    (path to name) are read for tensors besides the shards: an adapter's, or pickles; ``read_files`` are safetensors
    files of other checkpoints, where this one is put together of theirs. ``states`` are those of all files that were
    read, from before they were. ``config_changes`` is what ``config`` says otherwise than ``config_file``, for an
    adapter that changes the network itself. All paths have links followed; in the hub's cache their names are hashes.
    ``notes`` say what was put right on reading: ``names_on_disk`` (by name here) where a
    wrapper is left out of names, ``stale_settings`` of ``config.json`` that do not describe these weights, and are
    missing from ``config``.
    """

    folder: Path
    config_file: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    shards: Mapping[str, Shard]
    weights_index_file: Path | None
    weights_index: Mapping[str, Any] | None
    side_files: Mapping[str, Path]
    left_out: tuple[LeftOut, ...]
    weights_index_name: str | None = None
    headers_digest: str = ""
    other_files: Mapping[Path, str] = field(default_factory=dict)
    read_files: Mapping[Path, str] = field(default_factory=dict)
    states: Mapping[Path, FileState] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    names_on_disk: Mapping[str, str] = field(default_factory=dict)
    stale_settings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.spec.nbytes for entry in self.entries.values())

    @property
    def tensor_files(self) -> dict[Path, str]:
        """The files that hold tensors, by path, with their names."""
        shards = {shard.path: shard.name for shard in self.shards.values() if shard.path is not None}
        return shards | dict(self.read_files) | dict(self.other_files)

    @property
    def description_files(self) -> dict[Path, str]:
        """The configuration and the index of the weights, by path, with their names."""
        files = {self.config_file: CONFIG_NAME}
        if self.weights_index_file is not None and self.weights_index_name is not None:
            files[self.weights_index_file] = self.weights_index_name
        return files


def read_index(folder: str | os.PathLike[str] | Listing) -> CheckpointIndex:
    """Index the safetensors checkpoint in ``folder``, reading and checking headers only.

    Raises:
        CheckpointError: when the folder is not a checkpoint this package can rewrite; the message says why and
            what to do.
    """
    listing = list_folder(folder)
    if "model_index.json" in listing.files:
        raise CheckpointError(_pipeline_message(listing))
    if listing.is_adapter:
        raise CheckpointError(
            f"{listing.folder} is an adapter, not a checkpoint: give the base it was trained on "
            f"({_adapter_base(listing)}) with --base (base=), or in a merge as BASE+ADAPTER."
        )
    require_checkpoint(listing)
    config = listing.read_config()
    index_name, weights_name = weights_of(listing, config)
    weights_index = None if index_name is None else listing.read_json(index_name)
    if index_name is None:
        shard_names = [weights_name]
    else:
        weight_map = _weight_map(weights_index, f"{index_name} in {listing.folder}")
        shard_names = sorted(set(weight_map.values()))
    headers = {name: read_header(listing.file(name).path, name) for name in shard_names}
    entries = _collect_entries(headers.values())
    if index_name is not None:
        _require_all_there(weight_map, entries, config, index_name)

    read = [CONFIG_NAME, *shard_names, *([] if index_name is None else [index_name])]
    side_files, left_out = listing.side_files(read)
    return repaired(
        CheckpointIndex(
            folder=listing.folder,
            config_file=listing.file(CONFIG_NAME).path,
            config=config,
            entries=entries,
            shards={name: _shard(listing, name, header) for name, header in headers.items()},
            weights_index_file=None if index_name is None else listing.file(index_name).path,
            weights_index=weights_index,
            weights_index_name=index_name,
            side_files=side_files,
            left_out=left_out,
            states=listing.states(read),
        )
    )


def repaired(index: CheckpointIndex) -> CheckpointIndex:
    """The index, identified, with names and settings put right that only describe how the weights were saved.

    Raises:
        CheckpointError: the weights are quantised, or were saved empty.
    """
    _require_gathered(index.folder, index.entries)
    stale = stale_settings(index.folder, index.config, index.entries.values())
    if stale:
        notes = (*index.notes, describe_stale(stale))
        index = replace(index, config=without(index.config, stale), stale_settings=stale, notes=notes)
    renamed = unwrapped_names(index.entries)
    if renamed:
        entries = {renamed[name]: replace(entry, name=renamed[name]) for name, entry in index.entries.items()}
        shards = {
            name: replace(shard, tensors=tuple(renamed[tensor] for tensor in shard.tensors))
            for name, shard in index.shards.items()
        }
        names_on_disk = {bare: name for name, bare in renamed.items()}
        notes = (*index.notes, describe_wrapper(renamed))
        index = replace(index, entries=entries, shards=shards, names_on_disk=names_on_disk, notes=notes)
    return identified(index)


def identified(index: CheckpointIndex) -> CheckpointIndex:
    """The index with its ``headers_digest`` filled in from its ``states``."""
    files = index.tensor_files | index.description_files
    digest = hashlib.sha256(json.dumps([index.config, index.weights_index], sort_keys=True).encode())
    for shard in index.shards.values():
        layout = [(name, str(index.entries[name].spec), index.entries[name].begin) for name in shard.tensors]
        digest.update(json.dumps([shard.name, shard.metadata, layout]).encode())
    digest.update(json.dumps(sorted((name, index.states[path]) for path, name in files.items())).encode())
    return replace(index, headers_digest=digest.hexdigest())


def timeless_digest(index: CheckpointIndex) -> str:
    """The ``headers_digest`` without the times of files: the same for a copy that lies elsewhere."""
    timeless = replace(index, states={path: (state[0], 0) for path, state in index.states.items()})
    return identified(timeless).headers_digest


_PIECES, _PIECE_BYTES = 256, 4096


def content_digest(index: CheckpointIndex) -> str:
    """What a checkpoint holds, wherever and since whenever it lies there: SHA-256 in hex.

    Over its configuration, headers and file sizes, and over pieces all through the files that hold tensors (the whole
    file where it has at most 1 MiB). Two fine-tunes differ in it unless they differ in a few weights only.

    Raises:
        CheckpointError: when a file cannot be read.
    """
    if not index.tensor_files:  # in memory: its digest is that of the values
        return index.headers_digest
    digest = hashlib.sha256(timeless_digest(index).encode())
    for path, _ in sorted(index.tensor_files.items(), key=lambda item: item[1]):
        with reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            for number in range(_PIECES):
                file.seek(number * max(_PIECE_BYTES, size // _PIECES))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def lay_out_virtual(
    tensors: Mapping[str, Mapping[str, TensorSpec]], metadata: Mapping[str, str] | None
) -> tuple[dict[str, TensorEntry], dict[str, Shard]]:
    """Entries and shards of files that do not exist: shard name to its tensors in data order."""
    entries: dict[str, TensorEntry] = {}
    shards: dict[str, Shard] = {}
    for shard, specs in tensors.items():
        header_bytes = position = len(build_header(specs.items(), metadata))
        for name, spec in specs.items():
            entries[name] = TensorEntry(name, spec, shard, position, position + spec.nbytes)
            position += spec.nbytes
        shards[shard] = Shard(shard, None, position, header_bytes, metadata, tuple(specs))
    return entries, shards


def require_shard_name(name: str, where: str) -> None:
    """Refuse a shard name that could lead out of a folder, in or out.

    Raises:
        CheckpointError: for anything but a plain file name ending in ``.safetensors``.
    """
    if not _SHARD_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where} names the shard {shown(name)}, which is not a plain *.safetensors file name; "
            "do not trust this checkpoint."
        )


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds an adapter (peft) rather than a whole checkpoint."""
    return list_folder(folder).is_adapter


def _shard(listing: Listing, name: str, header: Header) -> Shard:
    file = listing.file(name)
    tensors = tuple(entry.name for entry in header.entries)
    return Shard(name, file.path, file.state[0], header.nbytes, header.metadata, tensors)


def _pipeline_message(listing: Listing) -> str:
    folder = listing.folder
    components = [
        name
        for name in listing.names(Kind.FOLDER, Kind.WEIGHTS_FOLDER)
        if (folder / name / CONFIG_NAME).is_file() and any((folder / name).glob("*.safetensors"))
    ]
    named = ", ".join(str(folder / name) for name in components) or "none with safetensors weights here"
    return f"{folder} is a pipeline of several models: pass one of its component folders ({named})."


def _adapter_base(listing: Listing) -> str:
    config = listing.read_json(ADAPTER_CONFIG_NAME)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return str(base)[:200] if base else "its adapter_config.json does not say which"


def _weight_map(weights_index: Any, where: str) -> Mapping[str, str]:
    weight_map = weights_index.get("weight_map") if isinstance(weights_index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{where} has no weight_map from tensors to shards; download it again.")
    for shard in weight_map.values():
        require_shard_name(shard, where)
    return weight_map


def _collect_entries(headers: Iterable[Header]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for header in headers:
        for entry in header.entries:
            if entry.name in entries:
                raise CheckpointError(
                    f"tensor {entry.name!r} is in both {entries[entry.name].shard} and {entry.shard}; "
                    "the checkpoint is malformed."
                )
            entries[entry.name] = entry
    return entries


def _require_all_there(
    weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry], config: Mapping[str, Any], where: str
) -> None:
    """Loaders read every tensor of every file that an index names; all it can get wrong is to promise too much."""
    for name, shard in weight_map.items():
        if name not in entries and not is_spare(name, config):
            raise CheckpointError(
                f"{where} promises tensor {shown(name)} in {shard}, and no file holds it: the checkpoint is not whole; "
                "save or download all of it again."
            )


def _require_gathered(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    empty = [name for name, entry in entries.items() if entry.spec.shape == _SHARDED_EMPTY and _is_parameter(name)]
    if empty:
        raise CheckpointError(
            f"{folder}: {len(empty)} of {len(entries)} tensors are empty, {empty[0]} among them: saved under DeepSpeed "
            "ZeRO-3 without gathering the weights; run zero_to_fp32.py in the training checkpoint, or train with "
            "stage3_gather_16bit_weights_on_model_save."
        )


def _is_parameter(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "bias")
