"""The keys of an adapter's file, sorted: what belongs to an update of a module, and what replaces a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from unmergeable.checkpoint.adapter.settings import MERGE_WITH_PEFT, Kind
from unmergeable.checkpoint.wrappers import without_insertions
from unmergeable.errors import CheckpointError, Mismatch

_PREFIX, _SHARED_PREFIX = "base_model.model.", "base_model."
_BASE_LAYER = ".base_layer"

# Every ending of an update's key that peft writes, and what the part is called here.
_PARTS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "embedding_a", "lora_embedding_B": "embedding_b",
    "lora_A": "a", "lora_B": "b", "lora_E": "energy", "lora_B.bias": "bias", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b",
    "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b", "lokr_w2": "w2", "lokr_w2_a": "w2_a",
    "lokr_w2_b": "w2_b",
    "vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d",
    "token_adapter.trainable_tokens_delta": "tokens", "trainable_tokens_delta": "tokens",
}  # fmt: skip
_UPDATE = re.compile(rf"(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_FOREIGN = re.compile(r"\.(lora|hada|lokr|vera|oft|ia3|boft|hra|token_adapter|trainable_tokens)_?[A-Za-z0-9_]*(\.|$)")
_OF_KIND: Mapping[Kind, frozenset[str]] = {
    "LORA": frozenset({"a", "b", "embedding_a", "embedding_b", "bias", "magnitude", "tokens"}),
    "ADALORA": frozenset({"a", "b", "energy"}),
    "LOHA": frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),
    "LOKR": frozenset({"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"}),
    "VERA": frozenset({"lambda_b", "lambda_d"}),
    "TRAINABLE_TOKENS": frozenset({"tokens"}),
    "LN_TUNING": frozenset(),
}


# In a state dict that did not go through peft's own saving, parts carry the name of the adapter: lora_A.default.weight.
_NAMED = re.compile(
    r"\.(?P<part>(lora|hada|lokr|vera|token_adapter\.trainable_tokens|trainable_tokens)_[A-Za-z0-9_]+)"
    r"\.(?!(?:weight|bias)$)(?P<adapter>[^.]+)(?=$|\.(?:weight|bias)$)"
)
_SAVED = ".modules_to_save."


def plain_keys(keys: Iterable[str], where: str) -> dict[str, str]:
    """The keys as peft writes them, each with the key in the file; ``where`` names the file in messages.

    Left out are what ``torch.compile``, FSDP, activation checkpointing, DDP and a second wrapping by peft insert, and
    the adapter's name where the keys carry it.

    Raises:
        CheckpointError: two keys are the same then, or they name several adapters.
    """
    keys = tuple(keys)
    adapters = sorted({found["adapter"] for key in keys if (found := _NAMED.search(key))})
    if len(adapters) > 1:
        raise CheckpointError(
            f"{where} holds several adapters ({', '.join(adapters)}): load it with peft and save one of them alone."
        )
    plain: dict[str, str] = {}
    for key in keys:
        name = _without_wrappers(key)
        if adapters:
            name = _NAMED.sub(r".\g<part>", name).replace(f"{_SAVED}{adapters[0]}.", _SAVED)
        if name in plain:
            raise CheckpointError(
                f"{where}: keys {plain[name]!r} and {key!r} are the same tensor {name!r}; save the adapter again."
            )
        plain[name] = key
    return plain


def _without_wrappers(key: str) -> str:
    name = without_insertions(key)
    start = name.find(_SHARED_PREFIX)
    if start > 0 and name[:start] in ("module.", "pretrained_model."):
        name = name[start:]
    while name.startswith(_PREFIX + _SHARED_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name


@dataclass(frozen=True)
class Keys:
    """Attributes:
    updates: by the module's path in memory, the keys of its parts. A module of which peft adapts several parameters
        is under its path as often as it is wrapped, with ``.base_layer`` for each wrapping inside.
    tensors: by a tensor's name in memory, the key of what replaces it.
    shared: keys that belong to no module, by name.
    """

    updates: dict[str, dict[str, str]] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)


def sort_keys(keys: Iterable[str], kind: Kind, where: str) -> Keys:
    """Sort the keys of an adapter of this kind; ``where`` names its file in messages.

    Raises:
        Mismatch: a key that peft did not write.
        CheckpointError: a key of another kind.
    """
    found = Keys()
    for key in keys:
        if not key.startswith(_PREFIX):
            if kind == "VERA" and key.removeprefix(_SHARED_PREFIX) in ("vera_A", "vera_B"):
                found.shared[key.removeprefix(_SHARED_PREFIX)] = key
                continue
            raise Mismatch(f"{where}: key {key!r} does not start with {_PREFIX}; save the adapter with peft.")
        name = key.removeprefix(_PREFIX)
        update = _UPDATE.fullmatch(name)
        if update is not None and _PARTS[update["part"]] in _OF_KIND[kind]:
            found.updates.setdefault(update["module"], {})[_PARTS[update["part"]]] = key
        elif update is not None or _FOREIGN.search(name):
            variant = "LoRA" if kind == "LORA" else kind
            raise CheckpointError(f"{where}: key {key!r} belongs to a variant of {variant}; {MERGE_WITH_PEFT}.")
        else:
            plain = name.replace(f"{_BASE_LAYER}.", ".").replace(".modules_to_save.", ".")
            if kind == "LN_TUNING":
                plain = plain.replace(".ln_tuning_layers.", ".")
            found.tensors[plain] = key
    return found


def unwrapped(module: str) -> tuple[str, int]:
    """A module's path without peft's wrappings, and how many lie around it."""
    depth = 0
    while module.endswith(_BASE_LAYER):
        module, depth = module.removesuffix(_BASE_LAYER), depth + 1
    return module, depth
