"""What a checkpoint folder holds, from the headers of its files alone.

Reading an index costs kilobytes however large the checkpoint, and loads no torch. Everything that can be known
to be wrong before the first tensor is read is refused here: damaged files, shard names that leave the folder,
pickles, pipelines, adapters, quantised weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.header import Header, TensorEntry, TensorSpec, build_header, read_header, strict_json
from unmergeable.checkpoint.side_files import CONFIG_NAME, LeftOut, resolve_inside, sort_side_files
from unmergeable.errors import CheckpointError

__all__ = [
    "CheckpointIndex",
    "LeftOut",
    "Shard",
    "TensorEntry",
    "TensorSpec",
    "is_adapter",
    "is_pickled",
    "lay_out_virtual",
    "read_config",
    "read_index",
    "refuse_quantised",
    "require_shard_name",
]

ADAPTER_CONFIG_NAME = "adapter_config.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_MAX_JSON_BYTES = 256_000_000  # an index of a million tensors takes about 100 MB

# What transformers and diffusers call the weights; tried in the order their configurations suggest.
_STEMS = ("model", "diffusion_pytorch_model")
_PICKLES = re.compile(r"(pytorch_model|diffusion_pytorch_model|model|adapter_model)([-.].*)?\.(bin|pth|pt)")
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


FileState = tuple[int, int]
"""Size in bytes and modification time in nanoseconds, which change when somebody replaces a file."""


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
    ``*.safetensors.index.json`` (None for a single file). ``side_files`` are copied byte for byte beside
    ``config_file`` and ``weights_index_file``. ``headers_digest`` identifies the checkpoint cheaply: SHA-256 over
    its configuration, index, headers, file sizes and modification times (not over its tensors). ``other_files``
    (path to name) are read for tensors besides the shards: an adapter's, or pickles. ``states`` are those of all
    files that were read so far, at that time.
    """

    folder: Path
    config_file: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    shards: Mapping[str, Shard]
    weights_index_file: Path | None
    weights_index: Mapping[str, Any] | None
    side_files: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]
    headers_digest: str = ""
    other_files: Mapping[Path, str] = field(default_factory=dict)
    states: Mapping[Path, FileState] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.spec.nbytes for entry in self.entries.values())

    @property
    def weights_index_name(self) -> str | None:
        """File name of the index of shards, if there is one."""
        return None if self.weights_index_file is None else self.weights_index_file.name


def read_index(folder: Path | str) -> CheckpointIndex:
    """Index the safetensors checkpoint in ``folder``, reading and checking headers only.

    Raises:
        CheckpointError: when the folder is not a checkpoint this package can rewrite; the message says why and
            what to do.
    """
    folder = Path(folder)
    _require_folder(folder)
    if (folder / "model_index.json").is_file():
        raise CheckpointError(_pipeline_message(folder))
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder} is an adapter, not a checkpoint: open it together with the base it was trained on "
            f"({_adapter_base(folder)})."
        )
    config = read_config(folder)
    weights_index_file, shard_names, weight_map = _find_weights(folder, config)
    headers = {name: _read_shard(folder, name) for name in shard_names}
    entries = _collect_entries(headers.values())
    if weight_map is not None:
        _require_agreement(weight_map, entries, weights_index_file)
    refuse_quantised(folder, config, entries.values())

    shards = {
        name: Shard(
            name,
            path,
            path.stat().st_size,
            header.nbytes,
            header.metadata,
            tuple(entry.name for entry in header.entries),
        )
        for name, (path, header) in headers.items()
    }
    claimed = {CONFIG_NAME, *shard_names} | ({weights_index_file.name} if weights_index_file else set())
    side_files, left_out = sort_side_files(folder, frozenset(claimed))
    return identified(
        CheckpointIndex(
            folder=folder,
            config_file=resolve_inside(folder, CONFIG_NAME),
            config=config,
            entries=entries,
            shards=shards,
            weights_index_file=weights_index_file,
            weights_index=None if weights_index_file is None else read_json(folder, weights_index_file.name),
            side_files=side_files,
            left_out=left_out,
        )
    )


def identified(index: CheckpointIndex) -> CheckpointIndex:
    """The index with ``states`` and ``headers_digest`` filled in."""
    files = {shard.path: shard.name for shard in index.shards.values() if shard.path is not None}
    files |= {index.config_file: CONFIG_NAME} | dict(index.other_files)
    if index.weights_index_file is not None:
        files[index.weights_index_file] = index.weights_index_file.name
    states = {path: state_of(path) for path in files}
    digest = hashlib.sha256(json.dumps([index.config, index.weights_index], sort_keys=True).encode())
    for shard in index.shards.values():
        layout = [(name, str(index.entries[name].spec), index.entries[name].begin) for name in shard.tensors]
        digest.update(json.dumps([shard.name, shard.metadata, layout]).encode())
    digest.update(json.dumps(sorted((name, states[path]) for path, name in files.items())).encode())
    return replace(index, states=states, headers_digest=digest.hexdigest())


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


def state_of(path: Path) -> FileState:
    """The state of a file now."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def require_shard_name(name: str, where: str) -> None:
    """Refuse a shard name that could lead out of a folder, in or out.

    Raises:
        CheckpointError: for anything but a plain file name ending in ``.safetensors``.
    """
    if not _SHARD_NAME.fullmatch(name):
        raise CheckpointError(
            f"{where} names the shard {name[:200]!r}, which is not a plain *.safetensors file name; "
            "do not trust this checkpoint."
        )


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter (peft) rather than a whole checkpoint."""
    return (folder / ADAPTER_CONFIG_NAME).is_file()


def is_pickled(folder: Path) -> bool:
    """Whether the only weights in ``folder`` are pickles."""
    names = [path.name for path in folder.iterdir()]
    return any(_PICKLES.fullmatch(name) for name in names) and not any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in names
    )


def read_config(folder: Path) -> Mapping[str, Any]:
    """Parse ``config.json``.

    Raises:
        CheckpointError: when it is missing or not a JSON object.
    """
    if not (folder / CONFIG_NAME).exists():
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}: pass the folder of a transformers or diffusers model.")
    config = read_json(folder, CONFIG_NAME)
    if not isinstance(config, dict):
        raise CheckpointError(f"{CONFIG_NAME} in {folder} is not a JSON object; download it again.")
    return config


def read_json(folder: Path, name: str) -> Any:
    """Parse one JSON file of a checkpoint folder, refusing repeated keys and links that leave the folder."""
    path = resolve_inside(folder, name)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{name} in {folder} is larger than {_MAX_JSON_BYTES:,} bytes; the file is malformed.")
    return strict_json(path.read_bytes(), f"{name} in {folder}")


def _require_folder(folder: Path) -> None:
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: pass the folder that holds it and its {CONFIG_NAME}.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: check the path.")


def _pipeline_message(folder: Path) -> str:
    components = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and (path / CONFIG_NAME).is_file() and any(path.glob("*.safetensors"))
    )
    named = ", ".join(str(folder / name) for name in components) or "none with safetensors weights here"
    return f"{folder} is a pipeline of several models: pass one of its component folders ({named})."


def _adapter_base(folder: Path) -> str:
    config = read_json(folder, ADAPTER_CONFIG_NAME)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return str(base) if base else "its adapter_config.json does not say which"


def _find_weights(
    folder: Path, config: Mapping[str, Any]
) -> tuple[Path | None, tuple[str, ...], Mapping[str, str] | None]:
    """The index file if there is one, the shards in order of name, and the index's weight map."""
    names = sorted(path.name for path in folder.iterdir())
    stems = _STEMS[::-1] if "_class_name" in config or "_diffusers_version" in config else _STEMS
    for stem in stems:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if single in names and index in names:
            raise CheckpointError(f"{folder} holds both {single} and {index}: remove the one that is out of date.")
        if single in names:
            return None, (single,), None
        if index in names:
            return _read_weight_map(folder, index)
    for stem in stems:
        # A variant: model.fp16.safetensors, or model.safetensors.index.fp16.json and its shards.
        singles = [name for name in names if re.fullmatch(rf"{stem}\.[A-Za-z0-9_]+\.safetensors", name)]
        indexes = [name for name in names if re.fullmatch(rf"{stem}\.safetensors\.index\.[A-Za-z0-9_]+\.json", name)]
        if len(singles) + len(indexes) > 1:
            raise CheckpointError(
                f"{folder} holds several variants ({', '.join(singles + indexes)}): keep the one to read."
            )
        if singles:
            return None, (singles[0],), None
        if indexes:
            return _read_weight_map(folder, indexes[0])
    raise CheckpointError(_no_weights_message(folder, names))


def _no_weights_message(folder: Path, names: Sequence[str]) -> str:
    pickles = [name for name in names if _PICKLES.fullmatch(name)]
    stray = [name for name in names if name.endswith(".safetensors")]
    if stray:
        return (
            f"{folder} has {stray[0]} but no index that names it; expected model.safetensors or "
            "model.safetensors.index.json: download the missing files."
        )
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened: convert them to "
            "safetensors, or pass --allow-pickle (allow_pickle=True)."
        )
    for suffix, meaning in _OTHER_FORMATS.items():
        for name in names:
            if name.endswith(suffix):
                return f"{folder} holds {name}, {meaning}."
    return f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json."


def _read_weight_map(folder: Path, name: str) -> tuple[Path, tuple[str, ...], Mapping[str, str]]:
    raw = read_json(folder, name)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{name} in {folder} has no weight_map from tensors to shards; download it again.")
    for shard in weight_map.values():
        require_shard_name(shard, f"{name} in {folder}")
    return folder / name, tuple(sorted(set(weight_map.values()))), weight_map


def _read_shard(folder: Path, name: str) -> tuple[Path, Header]:
    path = resolve_inside(folder, name)
    return path, read_header(path, name)


def _collect_entries(headers: Iterable[tuple[Path, Header]]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for _, header in headers:
        for entry in header.entries:
            if entry.name in entries:
                raise CheckpointError(
                    f"tensor {entry.name!r} is in both {entries[entry.name].shard} and {entry.shard}; "
                    "the checkpoint is malformed."
                )
            entries[entry.name] = entry
    return entries


def _require_agreement(
    weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry], index_file: Path | None
) -> None:
    where = "the index" if index_file is None else index_file.name
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(f"{where} promises tensor {name!r} in {shard}, which lacks it; download both again.")
        if entries[name].shard != shard:
            raise CheckpointError(
                f"{where} places tensor {name!r} in {shard}, but it is in {entries[name].shard}; download both again."
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
                raise CheckpointError(
                    f"{folder} is already quantised ({key}: {method or 'no method named'}); {remedy}."
                )
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
