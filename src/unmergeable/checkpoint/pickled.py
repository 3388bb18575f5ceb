"""Pickled weights (``*.bin``, ``*.pth``) behind the interface of a safetensors folder.

Only on explicit request, and only through torch's restricted unpickler (``weights_only=True``), which builds
tensors and plain containers and refuses everything else. The files are mapped, so memory holds one tensor.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import save_file_order
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec, lay_out_virtual, repaired
from unmergeable.checkpoint.listing import CONFIG_NAME, Listing, list_folder
from unmergeable.checkpoint.source import IndexedSource
from unmergeable.errors import CheckpointError, shown

_STEMS = ("pytorch_model", "diffusion_pytorch_model", "model")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(bin|pth|pt)")


class PickledCheckpoint(IndexedSource):
    """A folder of pickled weights as a source; its index is that of the safetensors files it would become."""

    def __init__(self, index: CheckpointIndex, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(index)
        self._tensors = tensors

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | Listing) -> PickledCheckpoint:
        """Unpickle the structure of every file in ``folder``; the tensors stay mapped.

        Raises:
            CheckpointError: for files that are missing, hold anything but tensors, or are quantised.
        """
        listing = list_folder(folder)
        config = listing.read_config()
        files, index_name = _find_files(listing)
        tensors: dict[str, torch.Tensor] = {}
        specs: dict[str, dict[str, TensorSpec]] = {}
        for name in files:
            state = load_state(listing.file(name).path, name)
            for key in state.keys() & tensors.keys():
                raise CheckpointError(f"tensor {key!r} is in {name} and in another file; the checkpoint is malformed.")
            tensors |= state
            stored = {key: TensorSpec(dtype_code(value.dtype), tuple(value.shape)) for key, value in state.items()}
            specs[_safetensors_name(name)] = {key: stored[key] for key in save_file_order(stored)}
        entries, shards = lay_out_virtual(specs, {"format": "pt"})
        side_files, left_out = listing.side_files([CONFIG_NAME, *files, *([index_name] if index_name else [])])
        index = CheckpointIndex(
            folder=listing.folder,
            config_file=listing.file(CONFIG_NAME).path,
            config=config,
            entries=entries,
            shards=shards,
            weights_index_file=None,
            weights_index=None,
            side_files=side_files,
            left_out=left_out,
            other_files={listing.file(name).path: name for name in files},
            states=listing.states([CONFIG_NAME, *files]),
        )
        return cls(repaired(index), tensors)

    def tensor(self, name: str) -> torch.Tensor:
        self.spec(name)
        return self._tensors[self.index.names_on_disk.get(name, name)].clone(memory_format=torch.contiguous_format)


def load_state(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one pickled file, mapped where the format allows it; ``name`` names it in messages.

    Raises:
        CheckpointError: when it needs more than tensors to unpickle, or holds something else.
    """
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can make its machine raise anything
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise CheckpointError(f"{name} cannot be unpickled safely ({reason}): convert it to safetensors.") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{name} holds a {type(state).__name__}, not a dict of tensors: convert it to safetensors."
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"{name} holds a {type(value).__name__} under {shown(key)} where only tensors may be: extract the "
                "weights and save them as safetensors."
            )
    return state


def _find_files(listing: Listing) -> tuple[tuple[str, ...], str | None]:
    for stem in _STEMS:
        index_name = f"{stem}.bin.index.json"
        if index_name in listing.files:
            raw = listing.read_json(index_name)
            weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index_name} in {listing.folder} has no weight_map; download it again.")
            for name in weight_map.values():
                if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
                    raise CheckpointError(
                        f"{index_name} names the file {shown(name)}, which is not a plain file name; "
                        "do not trust this checkpoint."
                    )
            return tuple(sorted(set(weight_map.values()))), index_name
        for suffix in (".bin", ".pth", ".pt"):
            if stem + suffix in listing.files:
                return (stem + suffix,), None
    raise CheckpointError(f"{listing.folder} has no pytorch_model.bin and no index of one.")


def _safetensors_name(name: str) -> str:
    stem = name.rpartition(".")[0]
    return stem.removeprefix("pytorch_") + ".safetensors"
