"""Configurations of networks that hold others: a vision tower in CLIP, a language model in a multimodal one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]


def kind_of(config: Config) -> str | None:
    """What a configuration calls its network: transformers' ``model_type``, or diffusers' ``_class_name``."""
    kind = config.get("model_type") or config.get("_class_name")
    return None if kind is None else str(kind)


def common_part(first: Config, second: Config) -> tuple[Config, Config] | None:
    """The configurations of the network that two have in common: of both as wholes, or of one and a part of the other.

    Two that say nothing of their kind are taken for one.

    Returns:
        The configuration of it in ``first`` and in ``second``; None where neither holds the other.
    """
    ours, theirs = kind_of(first), kind_of(second)
    if ours is None or theirs is None or ours == theirs:
        return first, second
    for part in _parts(first):
        if kind_of(part) == theirs:
            return part, second
    for part in _parts(second):
        if kind_of(part) == ours:
            return first, part
    return None


def _parts(config: Config) -> Iterator[Config]:
    return (value for value in config.values() if isinstance(value, Mapping) and kind_of(value) is not None)
