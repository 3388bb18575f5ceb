"""The tensors of an adapter, from ``adapter_model.safetensors`` or, if allowed, from its pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from unmergeable.checkpoint.adapter.keys import plain_keys
from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import TensorEntry, read_header
from unmergeable.checkpoint.index import TensorSpec
from unmergeable.checkpoint.listing import Listing
from unmergeable.checkpoint.pickled import load_state
from unmergeable.checkpoint.reader import OpenFiles
from unmergeable.checkpoint.source import empty_tensor
from unmergeable.errors import CheckpointError

_SAFE_WEIGHTS, _PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
NOT_GATHERED = (
    "training with DeepSpeed ZeRO-3 or FSDP leaves such a file when the weights are not gathered before saving; save "
    "the adapter again from the gathered weights"
)


class AdapterFile:
    """The adapter's own tensors by key, as peft writes keys: names of wrappers and of the adapter are left out."""

    def __init__(
        self, path: Path, name: str, entries: Mapping[str, TensorEntry], state: Mapping[str, torch.Tensor]
    ) -> None:
        self.path = path
        self.name = name
        plain = plain_keys((*entries, *state), name)
        self._entries = {key: entries[stored] for key, stored in plain.items() if stored in entries}
        self._state = {key: state[stored] for key, stored in plain.items() if stored in state}
        self.specs = {key: entry.spec for key, entry in self._entries.items()} | {
            key: TensorSpec(dtype_code(value.dtype), tuple(value.shape)) for key, value in self._state.items()
        }
        self._files = OpenFiles()
        self._require_content()

    @classmethod
    def open(cls, listing: Listing, *, allow_pickle: bool) -> AdapterFile:
        """Read the header, or unpickle.

        Raises:
            CheckpointError: for a file that is missing, may not be unpickled, or holds nothing.
        """
        if _SAFE_WEIGHTS in listing.files:
            path = listing.file(_SAFE_WEIGHTS).path
            header = read_header(path, _SAFE_WEIGHTS)
            return cls(path, _SAFE_WEIGHTS, {entry.name: entry for entry in header.entries}, {})
        if _PICKLED_WEIGHTS not in listing.files:
            raise CheckpointError(f"{_SAFE_WEIGHTS} is missing from {listing.folder}: download it again.")
        if not allow_pickle:
            raise CheckpointError(
                f"{listing.folder} holds only {_PICKLED_WEIGHTS}, a pickle, which can run code when opened: convert it "
                "to safetensors, or pass --allow-pickle (allow_pickle=True)."
            )
        path = listing.file(_PICKLED_WEIGHTS).path
        return cls(path, _PICKLED_WEIGHTS, {}, load_state(path, _PICKLED_WEIGHTS))

    def tensor(self, key: str) -> torch.Tensor:
        """A copy of the tensor, the caller's own."""
        if key in self._state:
            return self._state[key].clone(memory_format=torch.contiguous_format)
        tensor, view = empty_tensor(self.specs[key])
        self._files.read_into(view, self.path, self._entries[key].begin)
        return tensor

    def _require_content(self) -> None:
        if not self.specs:
            raise CheckpointError(f"{self.path} holds no tensor: {NOT_GATHERED}.")
        empty = [key for key, spec in self.specs.items() if spec.numel == 0]
        # AdaLoRA may leave a module no rank at all: tensors of size 0 beside others.
        if len(empty) == len(self.specs):
            raise CheckpointError(f"{self.path} holds empty tensors only ({empty[0]} …): {NOT_GATHERED}.")
