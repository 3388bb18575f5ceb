"""transformers' own way from the names of a network's tensors to those in its files."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def to_disk_names(network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by module name (weights, or what is shaped like them) renamed and split as the network's files are.

    Several names on disk may share one weight: files leave all of them out but one.
    """
    if not _is_from_transformers(network):
        return dict(tensors)
    loading = importlib.import_module("transformers.core_model_loading")
    renamed: dict[str, Tensor] = loading.revert_weight_conversion(network, dict(tensors))
    return renamed


def _is_from_transformers(network: Any) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(network).__mro__)
