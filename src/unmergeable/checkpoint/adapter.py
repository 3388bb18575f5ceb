r"""A LoRA adapter merged into its base while it is read.

    W' = W + (\alpha / r) B A          B: [out, r]   A: [r, in]        (Hu et al. 2021, arXiv:2106.09685)

with \alpha / \sqrt{r} for rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732). The sum is computed in
float64 in blocks of rows and rounded once to the base's dtype; what the adapter leaves alone comes from the base
byte for byte. Layers that store W transposed (GPT-2's Conv1D, embeddings) take the transposed product.

Anything beyond this formula is refused with the reason, settings of later peft versions included: a merge that
ignores a setting computes another model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regex
import torch

from unmergeable.checkpoint.dtypes import dtype_code, torch_dtype
from unmergeable.checkpoint.header import TensorEntry, read_header
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec, identified, lay_out_virtual
from unmergeable.checkpoint.listing import ADAPTER_CONFIG_NAME, CONFIG_NAME, LeftOut, Listing, list_folder
from unmergeable.checkpoint.pickled import load_state
from unmergeable.checkpoint.reader import OpenFiles
from unmergeable.checkpoint.source import Extent, IndexedSource, StoredSource, TensorSource, empty_tensor
from unmergeable.errors import CheckpointError, Mismatch, shown

_SAFE_WEIGHTS, _PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_MAX_ALPHA = 1e6
_PATTERN_SECONDS = 1.0
_PLAIN_NAME = re.compile(r"\w+")
_BLOCK_ELEMENTS = 1 << 21  # 16 MB of float64

BASE_HAS_ONE = "the base has one of the same name, which is kept"
_TOKENIZER = re.compile(
    r"tokenizer.*|sentencepiece.*|spiece.*|tekken.*|.*\.tiktoken|.*\.spm|bpe\.codes|special_tokens_map.*|added_tokens.*"
    r"|merges\..*|vocab\..*|chat_template.*",
    re.IGNORECASE,
)
_TERMS = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY).*", re.IGNORECASE)

# Settings that do not change what W' is, given A, B and the settings read below.
# fmt: off
_WITHOUT_EFFECT = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "ephemeral_gpu_offload", "runtime_config", "qalora_group_size", "ensure_weight_tying",
    }
)
# fmt: on
_REASONS = {
    "use_dora": "DoRA rescales each row of the merged weight",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "layer_replication": "it changes the number of layers",
    "target_parameters": "it adapts parameters that are not the weights of modules",
    "trainable_token_indices": "it replaces rows of the embedding",
    "lora_bias": "it adds to the bias as well",
    "use_qalora": "it pools the input",
}
# These start from a changed base (W minus the initial B A), which is not the base on disk. The others only choose
# where training starts.
_INITS_KEEPING_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraSettings:
    """What of ``adapter_config.json`` decides the merged weights."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Any, where: str) -> LoraSettings:
        """Read the settings, refusing every one this module does not implement.

        Raises:
            CheckpointError: naming the setting and why it is refused.
        """
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = str(config.get("peft_type"))[:100] if isinstance(config, dict) else None
            raise CheckpointError(
                f"{where}: adapter of type {kind}: only LORA can be merged; merge it with peft first."
            )
        for key, value in config.items():
            if value and key not in _WITHOUT_EFFECT:
                reason = _REASONS.get(key, "this version does not know what it does")
                raise CheckpointError(f"{where}: setting {key[:100]}: {reason}; merge it with peft first.")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in _INITS_KEEPING_BASE:
            raise CheckpointError(
                f"{where}: init_lora_weights {shown(start)} trains on a changed base; save the adapter with peft's "
                "path_initial_model_for_weight_conversion, or merge it with peft first."
            )
        try:
            return cls(
                rank=_rank(config["r"], where),
                alpha=_alpha(config["lora_alpha"], where),
                rank_pattern={key: _rank(value, where) for key, value in (config.get("rank_pattern") or {}).items()},
                alpha_pattern={key: _alpha(value, where) for key, value in (config.get("alpha_pattern") or {}).items()},
                rank_stabilised=bool(config.get("use_rslora")),
                fan_in_fan_out=bool(config.get("fan_in_fan_out")),
                modules_to_save=tuple(map(str, config.get("modules_to_save") or ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}: malformed ({shown(error)}); download it again.") from error

    def rank_of(self, module: str) -> int:
        """The rank of a module, by the first pattern that matches the end of its path."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scale(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        return alpha / (rank**0.5 if self.rank_stabilised else rank)


def _rank(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: malformed ({shown(value)} is no rank); download it again.")
    return value


def _alpha(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _MAX_ALPHA:
        raise CheckpointError(f"{where}: malformed ({shown(value)} is no alpha); download it again.")
    return float(value)


def _matching(patterns: Mapping[str, object], module: str) -> str:
    """The first pattern that peft would apply to ``module``, or the module itself."""
    for pattern in patterns:
        if module == pattern or module.endswith(f".{pattern}"):  # what peft writes itself: the path of a module
            return pattern
        if _PLAIN_NAME.fullmatch(pattern):
            continue
        try:
            # A stranger's expression may search without end, so not with the standard library, which cannot be stopped.
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS):
                return pattern
        except (regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{ADAPTER_CONFIG_NAME}: pattern {shown(pattern)} is malformed ({error}).") from error
        except TimeoutError:
            raise CheckpointError(
                f"{ADAPTER_CONFIG_NAME}: pattern {shown(pattern)} takes more than {_PATTERN_SECONDS:g} s on one name; "
                "write it without nested repetitions."
            ) from None
    return module


@dataclass(frozen=True)
class _LowRank:
    """One update; the keys are the adapter's. ``is_transposed`` says that the weight stores (B A)^T."""

    module: str
    key_a: str
    key_b: str
    scale: float
    is_transposed: bool


def add_low_rank(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """Add ``scale * left @ right`` to ``weight`` in place: float64, in blocks of rows, rounded once.

    Args:
        weight: [n, ...]; dimensions after the first are flattened to m (convolution kernels).
        left: [n, r].
        right: [r, m].
        scale: the factor.
    """
    flat = weight.view(weight.shape[0], -1)
    right = right.double()
    rows = max(1, _BLOCK_ELEMENTS // max(1, flat.shape[1]))
    for begin in range(0, flat.shape[0], rows):
        block = flat[begin : begin + rows]
        block.copy_(torch.addmm(block.double(), left[begin : begin + rows].double(), right, alpha=scale))


class AdaptedCheckpoint(IndexedSource):
    """A base with a LoRA adapter merged into it, as a source."""

    def __init__(
        self,
        index: CheckpointIndex,
        base: TensorSource,
        adapter: _AdapterFile,
        updates: Mapping[str, _LowRank],
        replacements: Mapping[str, str],
    ) -> None:
        super().__init__(index)
        self._base = base
        self._adapter = adapter
        self._updates = updates
        self._replacements = replacements

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str] | Listing, base: TensorSource, *, allow_pickle: bool = False
    ) -> AdaptedCheckpoint:
        """Read the adapter's settings and headers and match every key with a tensor of the base.

        Raises:
            CheckpointError: for an adapter of another kind, or a setting that is not implemented.
            Mismatch: for a key that matches no tensor of the base, or one of another shape.
        """
        listing = list_folder(folder)
        if not listing.is_adapter:
            raise CheckpointError(f"{listing.folder} has no {ADAPTER_CONFIG_NAME}: not an adapter.")
        config = listing.read_json(ADAPTER_CONFIG_NAME)
        settings = LoraSettings.from_config(config, f"{ADAPTER_CONFIG_NAME} in {listing.folder}")
        adapter = _AdapterFile.open(listing, allow_pickle=allow_pickle)
        updates, replacements, added = _match(adapter, base, settings)
        index = _index(listing, base, adapter, {name: adapter.specs[key] for name, key in added.items()})
        return cls(index, base, adapter, updates, replacements | added)

    @property
    def description(self) -> str:
        return f"{self._index.folder} on {self._base.description}"

    def stored(self, name: str) -> Extent | None:
        self.spec(name)
        if name in self._updates or name in self._replacements or not isinstance(self._base, StoredSource):
            return None
        return self._base.stored(name)

    def tensor(self, name: str) -> torch.Tensor:
        spec = self.spec(name)
        if name in self._replacements:
            tensor = self._adapter.tensor(self._replacements[name]).to(torch_dtype(spec.dtype))
        else:
            tensor = self._base.tensor(name)
        update = self._updates.get(name)
        if update is not None:
            a, b = self._adapter.tensor(update.key_a), self._adapter.tensor(update.key_b)
            a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
            left, right = (a.T, b.T) if update.is_transposed else (b, a)
            add_low_rank(tensor, left, right, update.scale)
        return tensor


class _AdapterFile:
    """The adapter's own tensors by key."""

    def __init__(
        self, path: Path, name: str, entries: Mapping[str, TensorEntry], state: Mapping[str, torch.Tensor]
    ) -> None:
        self.path = path
        self.name = name
        self.specs = {key: entry.spec for key, entry in entries.items()} | {
            key: TensorSpec(dtype_code(value.dtype), tuple(value.shape)) for key, value in state.items()
        }
        self._entries = entries
        self._state = state
        self._files = OpenFiles()

    @classmethod
    def open(cls, listing: Listing, *, allow_pickle: bool) -> _AdapterFile:
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
        if key in self._state:
            return self._state[key].clone(memory_format=torch.contiguous_format)
        tensor, view = empty_tensor(self.specs[key])
        self._files.read_into(view, self.path, self._entries[key].begin)
        return tensor


_LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")


def _match(
    adapter: _AdapterFile, base: TensorSource, settings: LoraSettings
) -> tuple[dict[str, _LowRank], dict[str, str], dict[str, str]]:
    """Updates and replacements by name of the base's tensor, and additions by their new name."""
    parts: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key in adapter.specs:
        if not key.startswith(_PREFIX):
            raise Mismatch(f"{adapter.name}: key {key!r} does not start with {_PREFIX}; save the adapter with peft.")
        if named := _LORA_KEY.fullmatch(key.removeprefix(_PREFIX)):
            parts.setdefault(named["module"], {})[named["part"]] = key
        elif ".lora_" in key:
            raise CheckpointError(
                f"{adapter.name}: key {key!r} belongs to a variant of LoRA; merge it with peft first."
            )
        else:
            others[key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key

    names = _NameMatcher(base)
    updates: dict[str, _LowRank] = {}
    for module, keys in parts.items():
        name = names.match(f"{module}.weight")
        if name is None:
            raise Mismatch(
                f"{adapter.name}: module {module!r} matches no tensor of {base.description}; pass the base it was "
                "trained on, or merge it with peft first."
            )
        if name in updates:
            raise Mismatch(
                f"{adapter.name}: modules {updates[name].module!r} and {module!r} are the same tensor {name!r}."
            )
        updates[name] = _low_rank(adapter, module, keys, base.spec(name), settings)
    _require_one_orientation(adapter, updates, base, settings)

    replacements: dict[str, str] = {}
    added: dict[str, str] = {}
    for target, key in others.items():
        name = names.match(target)
        if name is not None:
            if adapter.specs[key].shape != base.spec(name).shape:
                raise Mismatch(
                    f"{adapter.name}: {target!r} is {adapter.specs[key]} but {base.spec(name)} in {base.description}; "
                    "a resized model cannot be merged here, merge it with peft first."
                )
            replacements[name] = key
        elif _is_saved_module(target, settings):
            added[target] = key
        else:
            raise Mismatch(
                f"{adapter.name}: {target!r} matches no tensor of {base.description}; pass the base it was trained on."
            )
    return updates, replacements, added


def _is_saved_module(target: str, settings: LoraSettings) -> bool:
    """Whether a tensor the base lacks is a new head. A new output layer of a tied base is not: it would be ignored."""
    module = target.rpartition(".")[0]
    is_output_layer = module.rpartition(".")[2] in ("lm_head", "embed_out")
    return not is_output_layer and any(
        module == saved or module.endswith(f".{saved}") or f".{saved}." in f".{module}."
        for saved in settings.modules_to_save
    )


def _low_rank(
    adapter: _AdapterFile, module: str, keys: Mapping[str, str], weight: TensorSpec, settings: LoraSettings
) -> _LowRank:
    is_embedding = "lora_embedding_A" in keys
    wanted = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    if set(keys) != set(wanted):
        raise CheckpointError(f"{adapter.name}: module {module!r} has {sorted(keys)} where {list(wanted)} belong.")
    key_a, key_b = (keys[part] for part in wanted)
    a, b = adapter.specs[key_a].shape, adapter.specs[key_b].shape
    rank = settings.rank_of(module)
    if len(a) < 2 or len(b) < 2 or a[0] != rank or b[1] != rank or any(size != 1 for size in b[2:]):
        raise Mismatch(f"{adapter.name}: module {module!r} has A {list(a)} and B {list(b)} for rank {rank}.")
    fan_in = TensorSpec("U8", a[1:]).numel
    plain = weight.shape == (b[0], *a[1:])
    transposed = len(a) == 2 and weight.shape == (fan_in, b[0])
    if not plain and not transposed:
        raise Mismatch(
            f"{adapter.name}: module {module!r} updates {[b[0], *a[1:]]} but the base has {weight}; pass the base it "
            "was trained on."
        )
    is_transposed = transposed and (not plain or is_embedding or settings.fan_in_fan_out)
    return _LowRank(module, key_a, key_b, settings.scale(module), is_transposed)


def _require_one_orientation(
    adapter: _AdapterFile, updates: Mapping[str, _LowRank], base: TensorSource, settings: LoraSettings
) -> None:
    """For a square weight only ``fan_in_fan_out`` tells W from W^T, and peft saves one flag for all layers.

    An adapter over layers of both kinds holds the flag of whichever came last, so the flag is believed only while
    no weight that is not square contradicts it.
    """
    matrices = {
        name: update
        for name, update in updates.items()
        if len(base.spec(name).shape) == 2 and "lora_embedding_A" not in update.key_a
    }
    square = [name for name in matrices if len(set(base.spec(name).shape)) == 1]
    contrary = [
        name for name in matrices if name not in square and matrices[name].is_transposed != settings.fan_in_fan_out
    ]
    if square and contrary:
        raise CheckpointError(
            f"{adapter.name}: fan_in_fan_out is {settings.fan_in_fan_out}, which {contrary[0]!r} contradicts, so the "
            f"orientation of the square {square[0]!r} is unknown; merge it with peft first."
        )


class _NameMatcher:
    """Names of modules in memory against names on disk: equal, or off by one leading component.

    A head model prefixes its backbone (``transformer.h.0``), a backbone saved alone does not (``h.0``), and the
    other way round.
    """

    def __init__(self, base: TensorSource) -> None:
        self._names = frozenset(base.names)
        self._roots = tuple(dict.fromkeys(name.partition(".")[0] for name in base.names))

    def match(self, name: str) -> str | None:
        if name in self._names:
            return name
        candidates = {name.partition(".")[2], *(f"{root}.{name}" for root in self._roots)} & self._names
        return candidates.pop() if len(candidates) == 1 else None


def _index(
    listing: Listing, base: TensorSource, adapter: _AdapterFile, added: Mapping[str, TensorSpec]
) -> CheckpointIndex:
    """The index of the merged checkpoint: the base's, with new heads at the end of its last shard."""
    index = base.index
    read = (ADAPTER_CONFIG_NAME, adapter.name)
    own, left_out = listing.side_files([CONFIG_NAME, *read])
    side_files, superseded = combine_side_files(index.side_files, own)
    other_files = dict(index.other_files) | {listing.file(name).path: name for name in read}
    entries, shards = dict(index.entries), dict(index.shards)
    if added:
        last = shards[next(reversed(shards))]
        specs = {name: entries.pop(name).spec for name in last.tensors} | dict(added)
        moved, rebuilt = lay_out_virtual({last.name: specs}, last.metadata)
        entries |= moved
        shards |= rebuilt
        if last.path is not None:
            other_files[last.path] = last.name
    merged = replace(
        index,
        folder=listing.folder,
        entries=entries,
        shards=shards,
        side_files=side_files,
        left_out=(*left_out, *superseded, *index.left_out),
        other_files=other_files,
        states={**index.states, **listing.states(read)},
    )
    return identified(merged)


def combine_side_files(
    base: Mapping[str, Path], own: Mapping[str, Path]
) -> tuple[dict[str, Path], tuple[LeftOut, ...]]:
    """Side files of an adapter on its base: what to copy, in order of name, and what of its own is left out.

    The adapter's files replace the base's, and a tokenizer comes wholly from one of the two. Only the base's
    licence is never replaced: the result is a derivative of it.
    """
    brings_tokenizer = any(_TOKENIZER.fullmatch(name) for name in own)
    kept = {name: path for name, path in base.items() if not (brings_tokenizer and _TOKENIZER.fullmatch(name))}
    refused = [name for name in own if _TERMS.fullmatch(name) and name in kept]
    kept |= {name: path for name, path in own.items() if name not in refused}
    return {name: kept[name] for name in sorted(kept)}, tuple(LeftOut(name, BASE_HAS_ONE) for name in refused)
