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

from unmergeable.checkpoint.header import Header, TensorEntry, TensorSpec, build_header, read_header
from unmergeable.checkpoint.listing import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    FileState,
    Kind,
    LeftOut,
    Listing,
    list_folder,
)
from unmergeable.errors import CheckpointError, shown

__all__ = [
    "CheckpointIndex",
    "LeftOut",
    "Shard",
    "TensorEntry",
    "TensorSpec",
    "identified",
    "is_adapter",
    "lay_out_virtual",
    "read_index",
    "refuse_quantised",
    "require_shard_name",
]

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")

# What transformers and diffusers call the weights; tried in the order their configurations suggest.
_STEMS = ("model", "diffusion_pytorch_model")
_OTHER_FORMATS = {
    ".gguf": "a GGUF file: convert it to safetensors first",
    ".onnx": "an ONNX file: pass the safetensors checkpoint it was exported from",
    ".h5": "TensorFlow weights: convert them to safetensors first",
    ".msgpack": "Flax weights: convert them to safetensors first",
}

# Names that quantisers leave behind: GPTQ and AWQ, bitsandbytes, compressed-tensors and fp8, mxfp4, HQQ, quanto.
_QUANTISED_NAMES = re.compile(
    r"""(^|.*\.)(qweight | qzeros | g_idx | SCB | CB | absmax | nested_absmax | quant_map | nested_quant_map
    | quant_state\..* | weight_format | weight_packed | weight_scale | weight_scale_inv | weight_zero_point
    | \w+_blocks | W_q | weight\._data | weight\._scale | weight\.absmax | weight\.quant_.* )""",
    re.VERBOSE,
)
_EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


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
    (path to name) are read for tensors besides the shards: an adapter's, or pickles. ``states`` are those of all
    files that were read, from before they were. ``config_changes`` is what ``config`` says otherwise than
    ``config_file``, for an adapter that changes the network itself. All paths have links followed; in the hub's cache
    their names are hashes.
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
    states: Mapping[Path, FileState] = field(default_factory=dict)
    config_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.spec.nbytes for entry in self.entries.values())

    @property
    def tensor_files(self) -> dict[Path, str]:
        """The files that hold tensors, by path, with their names."""
        shards = {shard.path: shard.name for shard in self.shards.values() if shard.path is not None}
        return shards | dict(self.other_files)

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
            f"{listing.folder} is an adapter, not a checkpoint: open it together with the base it was trained on "
            f"({_adapter_base(listing)})."
        )
    config = listing.read_config()
    index_name, weights_name = _weights_of(listing, config)
    weights_index = None if index_name is None else listing.read_json(index_name)
    if index_name is None:
        shard_names = [weights_name]
    else:
        weight_map = _weight_map(weights_index, f"{index_name} in {listing.folder}")
        shard_names = sorted(set(weight_map.values()))
    headers = {name: read_header(listing.file(name).path, name) for name in shard_names}
    entries = _collect_entries(headers.values())
    if index_name is not None:
        _require_agreement(weight_map, entries, index_name)
    refuse_quantised(listing.folder, config, entries.values())

    read = [CONFIG_NAME, *shard_names, *([] if index_name is None else [index_name])]
    side_files, left_out = listing.side_files(read)
    return identified(
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


def identified(index: CheckpointIndex) -> CheckpointIndex:
    """The index with its ``headers_digest`` filled in from its ``states``."""
    files = index.tensor_files | index.description_files
    digest = hashlib.sha256(json.dumps([index.config, index.weights_index], sort_keys=True).encode())
    for shard in index.shards.values():
        layout = [(name, str(index.entries[name].spec), index.entries[name].begin) for name in shard.tensors]
        digest.update(json.dumps([shard.name, shard.metadata, layout]).encode())
    digest.update(json.dumps(sorted((name, index.states[path]) for path, name in files.items())).encode())
    return replace(index, headers_digest=digest.hexdigest())


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


def _weights_of(listing: Listing, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The name of the index of the weights, if there is one, or else of the one file that holds them."""
    folder, names = listing.folder, list(listing.files)
    stems = _STEMS[::-1] if "_class_name" in config or "_diffusers_version" in config else _STEMS
    for stem in stems:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if single in names and index in names:
            raise CheckpointError(f"{folder} holds both {single} and {index}: remove the one that is out of date.")
        if single in names or index in names:
            return (None, single) if single in names else (index, "")
    for stem in stems:
        # A variant: model.fp16.safetensors, or model.safetensors.index.fp16.json and its shards.
        singles = [name for name in names if re.fullmatch(rf"{stem}\.[A-Za-z0-9_]+\.safetensors", name)]
        indexes = [name for name in names if re.fullmatch(rf"{stem}\.safetensors\.index\.[A-Za-z0-9_]+\.json", name)]
        if len(singles) + len(indexes) > 1:
            raise CheckpointError(
                f"{folder} holds several variants ({', '.join(singles + indexes)}): keep the one to read."
            )
        if singles or indexes:
            return (None, singles[0]) if singles else (indexes[0], "")
    raise CheckpointError(_no_weights_message(listing))


def _no_weights_message(listing: Listing) -> str:
    folder = listing.folder
    if stray := listing.names(Kind.WEIGHTS):
        return (
            f"{folder} has {stray[0]} but no index that names it; expected model.safetensors or "
            "model.safetensors.index.json: download the missing files."
        )
    if pickles := listing.names(Kind.PICKLED_WEIGHTS):
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened: convert them to "
            "safetensors, or pass --allow-pickle (allow_pickle=True)."
        )
    for name in listing.names(Kind.OTHER_WEIGHTS):
        if meaning := _OTHER_FORMATS.get(Path(name).suffix):
            return f"{folder} holds {name}, {meaning}."
    return f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json."


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


def _require_agreement(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry], where: str) -> None:
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(
                f"{where} promises tensor {shown(name)} in {shard}, which lacks it; download both again."
            )
        if entries[name].shard != shard:
            raise CheckpointError(
                f"{where} places tensor {shown(name)} in {shard}, but it is in {entries[name].shard}; "
                "download both again."
            )
    for name, entry in entries.items():
        if name not in weight_map:
            raise CheckpointError(f"{where} does not list tensor {name!r} of {entry.shard}; download both again.")


def refuse_quantised(folder: Path, config: Mapping[str, Any], entries: Iterable[TensorEntry]) -> None:
    """Refuse weights that are already quantised: there is nothing left in them that could be rewritten exactly.

    Raises:
        CheckpointError: naming the setting or the tensor that shows it.
    """
    remedy = "pass the original checkpoint, before quantisation"
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                method = part[key].get("quant_method") if isinstance(part[key], dict) else None
                named = shown(method) if method else "no method named"
                raise CheckpointError(f"{folder} is already quantised ({key}: {named}); {remedy}.")
    for entry in entries:
        if entry.spec.dtype in _EIGHT_BIT_FLOATS:
            reason = f"holds {entry.spec.dtype}"
        elif _QUANTISED_NAMES.fullmatch(entry.name):
            reason = "is named as quantisers name theirs"
        elif entry.spec.dtype in _INTEGERS and entry.name.endswith("weight"):
            reason = f"is a weight in {entry.spec.dtype}"
        else:
            continue
        raise CheckpointError(f"{folder} is already quantised (tensor {entry.name!r} {reason}); {remedy}.")
