"""Quantised weights, which cannot be rewritten exactly, and configurations that call whole weights quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.header import TensorEntry
from unmergeable.errors import CheckpointError, shown

_KEYS = ("quantization_config", "compression_config")

# Names that quantisers leave behind: GPTQ and AWQ, bitsandbytes, compressed-tensors and fp8, mxfp4, HQQ, quanto.
_NAMES = re.compile(
    r"""(^|.*\.)(qweight | qzeros | g_idx | SCB | CB | absmax | nested_absmax | quant_map | nested_quant_map
    | quant_state\..* | weight_format | weight_packed | weight_scale | weight_scale_inv | weight_zero_point
    | \w+_blocks | W_q | weight\._data | weight\._scale | weight\.absmax | weight\.quant_.* )""",
    re.VERBOSE,
)
_EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_WHOLE = ("BF16", "F16", "F32", "F64")
_PART_OF_THE_NETWORK = ("bitnet",)
"""Methods that quantise whole weights whenever the network runs: without their entry it computes something else."""

_REMEDY = "pass the original checkpoint, before quantisation"


def stale_settings(folder: Path, config: Mapping[str, Any], entries: Iterable[TensorEntry]) -> tuple[str, ...]:
    """The entries of ``config.json`` (``part.entry``) that call weights quantised which are stored whole.

    QLoRA merged back leaves them behind; nothing in the files needs them.

    Raises:
        CheckpointError: the weights are quantised, naming the tensor that shows it; or the entry is part of what the
            network computes.
    """
    entries = tuple(entries)
    for entry in entries:
        if reason := _shows_quantisation(entry):
            named = _named(config)
            raise CheckpointError(f"{folder} is already quantised{named} (tensor {entry.name!r} {reason}); {_REMEDY}.")
    found = tuple(path for path, _ in _settings(config))
    for path, method in _settings(config):
        if method in _PART_OF_THE_NETWORK:
            raise CheckpointError(f"{folder} is quantised as it runs ({path}: {shown(method)}); {_REMEDY}.")
    if found and not any(entry.spec.dtype in _WHOLE and len(entry.spec.shape) > 1 for entry in entries):
        raise CheckpointError(f"{folder} is already quantised{_named(config)}; {_REMEDY}.")
    return found


def without(config: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """The configuration without entries that :func:`stale_settings` found."""
    result = dict(config)
    for setting in settings:
        part, _, key = setting.rpartition(".")
        if part:
            result[part] = {name: value for name, value in result[part].items() if name != key}
        else:
            result.pop(key)
    return result


def describe(settings: Iterable[str]) -> str:
    """One line for the user about settings that are left out."""
    return f"config.json: {' and '.join(settings)} left out, for the weights are whole."


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Where the configuration speaks of quantisation, and by which method."""
    parts = {"": config} | {name: value for name, value in config.items() if isinstance(value, Mapping)}
    for name, part in parts.items():
        for key in _KEYS:
            if name not in _KEYS and part.get(key):
                method = part[key].get("quant_method") if isinstance(part[key], Mapping) else None
                yield (f"{name}.{key}" if name else key), method


def _named(config: Mapping[str, Any]) -> str:
    for path, method in _settings(config):
        return f" by {shown(method)}" if method else f", says its {path}"
    return ""


def _shows_quantisation(entry: TensorEntry) -> str | None:
    if entry.spec.dtype in _EIGHT_BIT_FLOATS:
        return f"holds {entry.spec.dtype}"
    if _NAMES.fullmatch(entry.name):
        return "is named as quantisers name theirs"
    if entry.spec.dtype in _INTEGERS and entry.name.endswith("weight"):
        return f"is a weight in {entry.spec.dtype}"
    return None
