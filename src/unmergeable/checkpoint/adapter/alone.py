"""An adapter by itself, without its base: its products B A module by module, and a folder for others in their place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unmergeable.checkpoint.adapter.file import AdapterFile
from unmergeable.checkpoint.adapter.keys import sort_keys, unwrapped
from unmergeable.checkpoint.adapter.settings import AdapterSettings
from unmergeable.checkpoint.disk import read_file, write_file
from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import TensorSpec, build_header
from unmergeable.checkpoint.listing import ADAPTER_CONFIG_NAME, CONFIG_NAME, MANIFEST_NAME, Listing, list_folder
from unmergeable.checkpoint.manifest import FileRecord, Manifest, by_name, record_file
from unmergeable.checkpoint.partial import PartialFolder, completed_earlier, require_creatable, require_outside
from unmergeable.checkpoint.source import tensor_bytes
from unmergeable.errors import BadInput, CheckpointError

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Product:
    """``scale B A`` of one module, by the keys of B [out, rank, …] and A [rank, …].

    ``stacked`` is the number of experts of a parameter that holds several; 1 of a module.
    """

    module: str
    key_a: str
    key_b: str
    scale: float
    stacked: int = 1


@dataclass(frozen=True)
class LoneAdapter:
    """A LoRA folder, opened without its base. ``others`` are keys of what belongs to no product."""

    listing: Listing
    config: Mapping[str, Any]
    file: AdapterFile
    products: tuple[Product, ...]
    others: tuple[str, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> LoneAdapter:
        """Read settings and headers.

        Raises:
            CheckpointError: no adapter, one that holds nothing, or of another kind than LoRA.
        """
        listing = list_folder(folder)
        if not listing.is_adapter:
            raise CheckpointError(f"{listing.folder} has no {ADAPTER_CONFIG_NAME}: not an adapter.")
        config = listing.read_json(ADAPTER_CONFIG_NAME)
        settings = AdapterSettings.from_config(config, f"{ADAPTER_CONFIG_NAME} in {listing.folder}")
        if settings.kind != "LORA":
            raise CheckpointError(
                f"{listing.folder}: an adapter of type {settings.kind} has no products B A of its own; leave out "
                "--keep-adapter (keep_adapter)."
            )
        file = AdapterFile.open(listing, allow_pickle=allow_pickle)
        products = tuple(_products(file, settings))
        used = {key for product in products for key in (product.key_a, product.key_b)}
        return cls(listing, config, file, products, tuple(key for key in file.specs if key not in used))

    @property
    def folder(self) -> Path:
        return self.listing.folder


def _products(file: AdapterFile, settings: AdapterSettings) -> list[Product]:
    found = []
    for wrapped, parts in sort_keys(file.specs, settings.kind, file.name).updates.items():
        for first, second in (("a", "b"), ("embedding_a", "embedding_b")):
            if first not in parts:
                continue
            if second not in parts:
                raise CheckpointError(f"{file.name}: module {wrapped!r} has no B beside its A; save the adapter again.")
            module, _ = unwrapped(wrapped)
            rank = settings.rank_of(module)
            stored = file.specs[parts[first]].shape[0]
            if stored == 0 or stored % rank:
                raise CheckpointError(f"{file.name}: module {wrapped!r} has {stored} rows of A for rank {rank}.")
            scale = settings.scale(module)
            found.append(Product(wrapped, parts[first], parts[second], scale, stored // rank))
    return found


def write_adapter(
    source: Listing,
    out: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    *,
    details: Mapping[str, Any],
    inputs: Mapping[str, Sequence[Listing]],
) -> Manifest:
    """Write an adapter folder: tensors in their order, the side files of ``source``, a manifest. Whole, or not at all.

    Args:
        source: gives the side files, and the settings where ``config`` is None.
        out: the folder to create.
        tensors: by key.
        config: ``adapter_config.json``.
        details: the caller's part of the manifest.
        inputs: adapters by role, whose weights and settings the manifest lists.

    Raises:
        BadInput: ``out`` exists, or lies in an input folder.
        DiskError: it cannot be written.
    """
    require_creatable(out)
    require_outside(out, source.folder, *(listing.folder for listings in inputs.values() for listing in listings))
    side_files, left_out = source.side_files([CONFIG_NAME, ADAPTER_CONFIG_NAME, WEIGHTS])
    specs = [(key, TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape))) for key, tensor in tensors.items()]
    weights = build_header(specs, {"format": "pt"}) + b"".join(bytes(tensor_bytes(value)) for value in tensors.values())
    settings = json.dumps(config, indent=2).encode() + b"\n" if config is not None else None
    files = {
        WEIGHTS: weights,
        ADAPTER_CONFIG_NAME: settings or read_file(source.file(ADAPTER_CONFIG_NAME).path),
        **{name: read_file(path) for name, path in side_files.items()},
    }
    token = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
    if completed_earlier(out, token):
        raise BadInput(f"{out} exists and is complete: an earlier run of this command wrote it.")
    with PartialFolder(out, token) as folder:
        folder.remove_all_but(())
        records = [_written(folder.files / name, data) for name, data in files.items()]
        manifest = Manifest(
            outputs=by_name(records),
            inputs={role: _recorded(listings) for role, listings in inputs.items()},
            left_out=left_out,
            details=details,
        )
        write_file(folder.files / MANIFEST_NAME, manifest.to_json().encode())
        folder.commit()
    return manifest


def _written(path: Path, data: bytes) -> FileRecord:
    write_file(path, data)
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def _recorded(listings: Sequence[Listing]) -> tuple[FileRecord, ...]:
    names = ("adapter_model.safetensors", "adapter_model.bin", ADAPTER_CONFIG_NAME)
    return tuple(
        record_file(listing.file(name).path, name) for listing in listings for name in names if name in listing.files
    )
