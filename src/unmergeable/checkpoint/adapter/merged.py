"""A base with an adapter merged into it, as a source: each tensor is computed when it is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from unmergeable.checkpoint.adapter.file import AdapterFile
from unmergeable.checkpoint.adapter.heads import Outcome, settle, spec_of, trained_class
from unmergeable.checkpoint.adapter.matching import match
from unmergeable.checkpoint.adapter.names import Names
from unmergeable.checkpoint.adapter.settings import AdapterSettings
from unmergeable.checkpoint.adapter.skeleton import Skeleton, part_of_class
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.index import CheckpointIndex, Shard, TensorEntry, identified, lay_out_virtual
from unmergeable.checkpoint.listing import ADAPTER_CONFIG_NAME, CONFIG_NAME, LeftOut, Listing, list_folder
from unmergeable.checkpoint.source import Extent, IndexedSource, StoredSource, TensorSource
from unmergeable.checkpoint.vocabulary import is_tokenizer_file
from unmergeable.errors import CheckpointError

BASE_HAS_ONE = "the base has one of the same name, which is kept"
_TERMS = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY).*", re.IGNORECASE)


class AdaptedCheckpoint(IndexedSource):
    """A base with an adapter merged into it, as a source."""

    def __init__(self, index: CheckpointIndex, base: TensorSource, adapter: AdapterFile, outcome: Outcome) -> None:
        super().__init__(index)
        self._base = base
        self._adapter = adapter
        self._outcome = outcome

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str] | Listing, base: TensorSource, *, allow_pickle: bool = False
    ) -> AdaptedCheckpoint:
        """Read the adapter's settings and headers and match every key with a tensor of the base.

        Raises:
            CheckpointError: for an adapter of another kind, one that holds nothing, a setting that is not implemented,
                or an adapter whose merge would not compute what it computes.
            Mismatch: for a key that matches no tensor of the base, or one of another shape.
        """
        listing = list_folder(folder)
        if not listing.is_adapter:
            raise CheckpointError(f"{listing.folder} has no {ADAPTER_CONFIG_NAME}: not an adapter.")
        config = listing.read_json(ADAPTER_CONFIG_NAME)
        settings = AdapterSettings.from_config(config, f"{ADAPTER_CONFIG_NAME} in {listing.folder}")
        adapter = AdapterFile.open(listing, allow_pickle=allow_pickle)
        names = Names(
            base,
            lambda: Skeleton.of(base.config, trained_class(base.config, settings)),
            lambda: part_of_class(base.config, settings.network_class),
        )
        outcome = settle(adapter, base, settings, names, match(adapter, base, settings, names))
        return cls(_index(listing, base, adapter, outcome), base, adapter, outcome)

    @property
    def description(self) -> str:
        return f"{self._index.folder} on {self._base.description}"

    def stored(self, name: str) -> Extent | None:
        self.spec(name)
        changed = name in self._outcome.updates or name in self._outcome.replacements
        if changed or not isinstance(self._base, StoredSource):
            return None
        return self._base.stored(self._outcome.copies.get(name, name))

    def tensor(self, name: str) -> torch.Tensor:
        spec = self.spec(name)
        if name in self._outcome.replacements:
            tensor = self._adapter.tensor(self._outcome.replacements[name]).to(torch_dtype(spec.dtype))
        else:
            tensor = self._base.tensor(self._outcome.copies.get(name, name))
        update = self._outcome.updates.get(name)
        if update is not None:
            update.apply(tensor, self._adapter.tensor)
        return tensor


def _index(listing: Listing, base: TensorSource, adapter: AdapterFile, outcome: Outcome) -> CheckpointIndex:
    """The index of the merged checkpoint: the base's, without what is dropped and with new tensors at its end."""
    index = base.index
    read = (ADAPTER_CONFIG_NAME, adapter.name)
    own, left_out = listing.side_files([CONFIG_NAME, *read])
    side_files, superseded = combine_side_files(index.side_files, own)
    other_files = dict(index.other_files) | {listing.file(name).path: name for name in read}
    added = [name for name in (*outcome.copies, *outcome.replacements) if name not in index.entries]
    if added or outcome.dropped:
        index = _laid_out_again(index, base, adapter, outcome, added, other_files)
    merged = replace(
        index,
        folder=listing.folder,
        config={**base.config, **outcome.config_changes},
        config_changes={**index.config_changes, **outcome.config_changes},
        side_files=side_files,
        left_out=(*left_out, *superseded, *index.left_out),
        other_files=other_files,
        states={**index.states, **listing.states(read)},
    )
    return identified(merged)


def _laid_out_again(
    index: CheckpointIndex,
    base: TensorSource,
    adapter: AdapterFile,
    outcome: Outcome,
    added: list[str],
    other_files: dict[Path, str],
) -> CheckpointIndex:
    """The index with the shards laid out anew that lose or gain a tensor; their files go to ``other_files``."""
    entries: dict[str, TensorEntry] = {}
    shards: dict[str, Shard] = {}
    last = tuple(index.shards)[-1]
    for name, shard in index.shards.items():
        kept = [tensor for tensor in shard.tensors if tensor not in outcome.dropped]
        kept += added if name == last else []
        if tuple(kept) == shard.tensors:
            shards[name] = shard
            entries |= {tensor: index.entries[tensor] for tensor in kept}
        elif kept:
            specs = {tensor: spec_of(outcome, adapter, base, tensor) for tensor in kept}
            moved, rebuilt = lay_out_virtual({name: specs}, shard.metadata)
            entries |= moved
            shards |= rebuilt
        if tuple(kept) != shard.tensors and shard.path is not None:
            other_files[shard.path] = shard.name
    # An index that lists other tensors than there are is written anew.
    return replace(index, entries=entries, shards=shards, weights_index_file=None)


def combine_side_files(
    base: Mapping[str, Path], own: Mapping[str, Path]
) -> tuple[dict[str, Path], tuple[LeftOut, ...]]:
    """Side files of an adapter on its base: what to copy, in order of name, and what of its own is left out.

    The adapter's files replace the base's, and a tokenizer comes wholly from one of the two. Only the base's
    licence is never replaced: the result is a derivative of it.
    """
    brings_tokenizer = any(is_tokenizer_file(name) for name in own)
    kept = {name: path for name, path in base.items() if not (brings_tokenizer and is_tokenizer_file(name))}
    refused = [name for name in own if _TERMS.fullmatch(name) and name in kept]
    kept |= {name: path for name, path in own.items() if name not in refused}
    return {name: kept[name] for name in sorted(kept)}, tuple(LeftOut(name, BASE_HAS_ONE) for name in refused)
