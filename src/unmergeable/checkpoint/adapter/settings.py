"""What ``adapter_config.json`` says that decides the merged weights; every setting beyond that is refused.

A merge that ignores a setting computes another model, so a setting that this module does not know, of a later peft
say, is refused too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import regex

from unmergeable.checkpoint.listing import ADAPTER_CONFIG_NAME
from unmergeable.errors import CheckpointError, shown

Kind = Literal["LORA", "ADALORA", "LOHA", "LOKR", "VERA", "TRAINABLE_TOKENS", "LN_TUNING"]
"""What peft calls the adapters whose result is a sum with, or a replacement of, weights of the base."""

Tokens = tuple[int, ...]

MERGE_WITH_PEFT = "merge it with peft first"
_MAX_ALPHA = 1e6
_PATTERN_SECONDS = 1.0
_PLAIN_NAME = re.compile(r"\w+")

# Settings that do not change what the merged weights are, given the stored tensors and the settings read below.
# fmt: off
_OF_EVERY_KIND = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping",
        "inference_mode", "r", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "init_weights",
        "init_lora_weights",
    }
)
_OF_LORA = frozenset(
    {
        "lora_alpha", "lora_dropout", "use_rslora", "megatron_core", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "ephemeral_gpu_offload", "runtime_config", "qalora_group_size", "ensure_weight_tying",
    }
)
_OF_LYCORIS = frozenset({"alpha", "rank_dropout", "module_dropout"})
_WITHOUT_EFFECT: Mapping[Kind, frozenset[str]] = {
    "LORA": _OF_LORA | {"use_dora", "lora_bias", "trainable_token_indices", "target_parameters"},
    "ADALORA": (_OF_LORA - {"use_rslora"}) | {
        "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"
    },
    "LOHA": _OF_LYCORIS,
    "LOKR": _OF_LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    "VERA": frozenset({"projection_prng_key", "save_projection", "vera_dropout", "d_initial"}),
    "TRAINABLE_TOKENS": frozenset({"token_indices"}),
    "LN_TUNING": frozenset(),
}
# fmt: on
_REASONS = {"use_effective_conv2d": "it stores kernels as a product of four factors"}

# What peft refuses to merge, or merges (X-LoRA, replicated layers) into what does not compute what the adapter does.
_NO_WEIGHTS_OF_SETTINGS = {
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "arrow_config": "it chooses among adapters by the input",
    "layer_replication": "it changes the number of layers",
    "use_qalora": "it pools the input of quantised layers",
}
_VECTORS = "it puts trained vectors before the input"
_KEYS_AND_VALUES = "it puts trained keys and values before those of the input"
_NO_WEIGHTS_OF_KINDS = {
    "ADAPTION_PROMPT": "it attends to a trained prompt as well",
    "CARTRIDGE": _KEYS_AND_VALUES,
    "CPT": _VECTORS,
    "LILY": "it mixes its updates by the input",
    "MULTITASK_PROMPT_TUNING": _VECTORS,
    "POLY": "it mixes its updates by the task",
    "PREFIX_TUNING": _KEYS_AND_VALUES,
    "PROMPT_TUNING": _VECTORS,
    "P_TUNING": _VECTORS,
    "SHADOW": "it runs a second network beside the layers",
    "XLORA": "it mixes its updates by the input",
}
_NOT_BY_PEFT_EITHER = "which no weights of the base do, so that peft cannot merge it either"

_REASONS_OF_KINDS = {"BEFT": "it trains biases, which peft can merge only where the base has them; "}

# These start from a changed base (W minus the initial B A), which is not the base on disk. The others only choose
# where training starts.
_INITS_KEEPING_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterSettings:
    """What of ``adapter_config.json`` decides the merged weights.

    Attributes:
        rank, alpha: of modules that no pattern names; the rank is 0 where the kind has none.
        initial_rank: of AdaLoRA, by which it goes on dividing after it has dropped ranks.
        tokens: of trained rows of embeddings, by the end of a module's path; under "" for every module.
        parameters: adapted parameters that are not the weight of a module, as ``module.parameter`` or its end.
        task: what peft calls the task, "" where it is not said; ``network_class``: the class it was trained in, then.
    """

    rank: int = 0
    alpha: float = 1.0
    kind: Kind = "LORA"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    initial_rank: int = 0
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    task: str = ""
    network_class: str = ""

    @classmethod
    def from_config(cls, config: Any, where: str) -> AdapterSettings:
        """Read the settings, refusing every one that is not implemented.

        Raises:
            CheckpointError: naming the setting and why it is refused.
        """
        kind = _kind(config, where)
        _require_known(config, kind, where)
        try:
            return cls(
                kind=kind,
                rank=0 if kind in ("TRAINABLE_TOKENS", "LN_TUNING", "ADALORA") else _rank(config["r"], where),
                alpha=_alpha(config.get("lora_alpha", config.get("alpha", 1.0)), where),
                rank_pattern=_pattern(config, "rank_pattern", _rank, where) if kind != "ADALORA" else {},
                alpha_pattern=_pattern(config, "alpha_pattern", _alpha, where),
                rank_stabilised=bool(config.get("use_rslora")),
                fan_in_fan_out=bool(config.get("fan_in_fan_out")),
                modules_to_save=tuple(map(str, config.get("modules_to_save") or ())),
                initial_rank=_rank(config["init_r"], where) if kind == "ADALORA" else 0,
                tokens=_tokens(config.get("trainable_token_indices") or config.get("token_indices"), where),
                parameters=tuple(map(str, config.get("target_parameters") or ())),
                task=str(config.get("task_type") or ""),
                network_class=str((config.get("auto_mapping") or {}).get("base_model_class") or ""),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}: malformed ({shown(error)}); download it again.") from error

    def rank_of(self, module: str) -> int:
        """The rank of a module, by the first pattern that matches the end of its path."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scale(self, module: str) -> float:
        """The factor of a module's product; of AdaLoRA see :meth:`adaptive_scale`."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        return alpha / (rank**0.5 if self.rank_stabilised else rank)

    def adaptive_scale(self, rank: int) -> float:
        """AdaLoRA's factor of a module that kept this rank. peft divides by the rank it began with, plus 1e-5."""
        return (self.alpha if self.alpha > 0 else float(rank)) / (self.initial_rank + 1e-5)

    def tokens_of(self, module: str) -> Tokens:
        """The rows of an embedding that were trained, in the order of the stored rows."""
        ends = [end for end in self.tokens if end == "" or module == end or module.endswith(f".{end}")]
        return self.tokens[max(ends, key=len)] if ends else ()


def _kind(config: Any, where: str) -> Kind:
    kind: Any = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in get_args(Kind):
        named = f"{where}: adapter of type {str(kind)[:100]}:"
        if str(kind) in _NO_WEIGHTS_OF_KINDS:
            raise CheckpointError(
                f"{named} {_NO_WEIGHTS_OF_KINDS[str(kind)]}, {_NOT_BY_PEFT_EITHER}; train one of type LORA instead."
            )
        known = ", ".join(get_args(Kind))
        reason = _REASONS_OF_KINDS.get(str(kind), "")
        raise CheckpointError(f"{named} {reason}only {known} can be merged here; {MERGE_WITH_PEFT}.")
    result: Kind = kind
    return result


def _require_known(config: Mapping[str, Any], kind: Kind, where: str) -> None:
    known = _OF_EVERY_KIND | _WITHOUT_EFFECT[kind]
    for key, value in config.items():
        if value and key in _NO_WEIGHTS_OF_SETTINGS:
            raise CheckpointError(
                f"{where}: setting {key}: {_NO_WEIGHTS_OF_SETTINGS[key]}, {_NOT_BY_PEFT_EITHER}; train an adapter "
                "without it."
            )
        if value and key not in known:
            reason = _REASONS.get(key, "this version does not know what it does")
            raise CheckpointError(f"{where}: setting {key[:100]}: {reason}; {MERGE_WITH_PEFT}.")
    start = config.get("init_lora_weights")
    if kind == "LORA" and isinstance(start, str) and start.lower() not in _INITS_KEEPING_BASE:
        raise CheckpointError(
            f"{where}: init_lora_weights {shown(start)} trains on a changed base; save the adapter with peft's "
            f"path_initial_model_for_weight_conversion, or {MERGE_WITH_PEFT}."
        )
    if kind == "VERA" and not config.get("save_projection", True):
        raise CheckpointError(
            f"{where}: VeRA without its projections, which peft draws anew by torch's version; save the adapter with "
            f"save_projection=True, or {MERGE_WITH_PEFT}."
        )


def _pattern(config: Mapping[str, Any], name: str, read: Any, where: str) -> dict[str, Any]:
    return {key: read(value, where) for key, value in (config.get(name) or {}).items()}


def _rank(value: object, where: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: malformed ({shown(value)} is no rank); download it again.")
    return value


def _alpha(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _MAX_ALPHA:
        raise CheckpointError(f"{where}: malformed ({shown(value)} is no alpha); download it again.")
    return float(value)


def _tokens(value: object, where: str) -> dict[str, Tokens]:
    by_module: dict[Any, Any] = value if isinstance(value, dict) else {"": value or []}
    found: dict[str, Tokens] = {}
    for module, indices in by_module.items():
        is_list = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
        if not is_list or len(set(indices)) < len(indices):
            raise CheckpointError(f"{where}: malformed ({shown(indices)} are no token numbers); download it again.")
        if indices:
            found[str(module)] = tuple(indices)
    return found


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
