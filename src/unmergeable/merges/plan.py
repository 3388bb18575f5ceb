"""What a merge of checkpoints writes: a plan of its tensors, and what its ``config.json`` says differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmergeable.checkpoint.finite import is_finite
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.plan import OutputTensor, output_like
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges.base import TensorMerge
from unmergeable.merges.blocks import BLOCK_ELEMENTS, Operand, Scratch
from unmergeable.merges.models import source_operand, stored_as
from unmergeable.merges.networks import Networks


def plan(networks: Networks, merge_tensor: TensorMerge, out_dtype: torch.dtype | None) -> tuple[OutputTensor, ...]:
    """The tensors of a merge in the template's order, shards and dtypes, or in ``out_dtype``."""
    scratch, template = Scratch(), networks.template

    def merged(name: str, spec: TensorSpec, shard: str, *, as_name: str | None = None) -> OutputTensor:
        def merge() -> Tensor:
            return merge_tensor(name, networks.operands(name), scratch)

        return OutputTensor(as_name or name, spec, shard, fill=partial(fill, name, merge, scratch))

    def planned(tensor: OutputTensor) -> OutputTensor:
        spec = stored_as(networks.spec(tensor.name), out_dtype)
        if tensor.name in networks.shares:
            return merged(tensor.name, spec, tensor.shard)
        if (original := networks.copies.get(tensor.name)) in networks.shares:
            # Tied weights stay equal, also where a merge draws masks by name.
            assert original is not None
            return merged(original, spec, tensor.shard, as_name=tensor.name)
        if spec == tensor.spec:
            return tensor
        return replace(tensor, spec=spec, fill=partial(_copy, tensor.name, networks.kept(tensor.name)))

    def added(name: str, shard: str) -> OutputTensor:
        _, origin = networks.added[name]
        spec = stored_as(networks.spec(name), out_dtype)
        if origin is None:
            return merged(name, spec, shard)
        return OutputTensor(name, spec, shard, fill=partial(_copy, name, _operand(*origin)))

    last = list(template.index.shards)[-1]
    extra = [added(name, last) for name in networks.added]
    return tuple(
        tensor if tensor.name in networks.added else planned(tensor)
        for tensor in output_like(template, {}, extra=extra)
    )


def _operand(source: TensorSource, name: str) -> Operand:
    return source_operand(source.description, source, name)


def fill(name: str, merge: Callable[[], Tensor], scratch: Scratch, out: Tensor) -> None:
    """Have tensor ``name`` merged into ``out``, whose dtype the result is rounded to."""
    with scratch.into(out):
        merged = merge()
    if merged.shape != out.shape:
        raise UsageError(f"{name}: the method returned a tensor of {list(merged.shape)} for one of {list(out.shape)}.")
    if merged.data_ptr() != out.data_ptr():  # the method used memory of its own
        out.copy_(merged)


def _copy(name: str, operand: Operand, out: Tensor) -> None:
    flat, start = out.reshape(-1), 0
    for block in operand.read(BLOCK_ELEMENTS):
        flat[start : start + len(block)].copy_(block)
        start += len(block)
    if out.is_floating_point() and not is_finite(out):
        raise BadInput(f"{name}: {operand.label} does not fit into {out.dtype} there; use a wider dtype.")


def config_changes(networks: Networks, out_dtype: torch.dtype | None) -> dict[str, Any] | None:
    """What the template's ``config.json`` has to say differently; None where nothing."""
    config = networks.template.config
    changes = networks.vocabularies.config_changes(config)
    if networks.is_untied:
        changes = _merged(changes, _untied(config))
    if out_dtype is not None:
        changes = _merged(changes, dtype_changes(config, out_dtype))
    return changes or None


def dtype_changes(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What a ``config.json`` has to say differently when the weights are stored as ``dtype``."""
    name = str(dtype).removeprefix("torch.")
    changes = _renamed_dtypes(config, name)
    return changes if {"dtype", "torch_dtype"} & changes.keys() else {**changes, "dtype": name}


def _renamed_dtypes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries that name a dtype, also in the configurations of parts (``text_config``)."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changes[key] = name
        elif isinstance(value, Mapping) and (inner := _renamed_dtypes(value, name)):
            changes[key] = inner
    return changes


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    parts = {"text_config": {"tie_word_embeddings": False}} if isinstance(text, Mapping) else {}
    return {"tie_word_embeddings": False, **parts}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged
