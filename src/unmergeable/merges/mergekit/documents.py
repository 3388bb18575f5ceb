"""mergekit's configurations as documents: the models one names, and the one that asks for a method.

Models are folders relative to the configuration's own, or ``folder+adapter``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.open import open_checkpoint, split_adapter
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges.mergekit.config import parse_config
from unmergeable.merges.mergekit.methods import METHODS

_KEYS = ("model", "base_model")


def models_named(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Every model a configuration names, once each."""
    models: dict[str, None] = {}
    _with_models(document, lambda model: models.setdefault(model) or model)
    return tuple(models)


def absolute_paths(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with every model's path made absolute; relative ones start at ``folder``."""

    def absolute(model: str) -> str:
        path, adapter = split_adapter(model, folder)
        return str(path.absolute()) if adapter is None else f"{path.absolute()}+{adapter.absolute()}"

    return _with_models(document, absolute)


def open_model(model: str, folder: Path) -> TensorSource:
    """Open a model by the name it has in a configuration that lies in ``folder``.

    Raises:
        BadInput: when there is no such folder.
    """
    path, adapter = split_adapter(model, folder)
    for part in (path, adapter):
        if part is not None and not part.is_dir():
            raise BadInput(f"model {model}: {part} is no folder; download the model and give its folder.")
    return open_checkpoint(path) if adapter is None else open_checkpoint(adapter, base=path)


def document_of(
    method: str,
    experts: Sequence[tuple[Path, float]],
    base: Path | None,
    settings: Mapping[str, object],
    *,
    out_dtype: str,
) -> dict[str, Any]:
    """The configuration that has mergekit merge experts with its method of this name, in float32.

    Args:
        method: one that mergekit has.
        experts: folders and coefficients.
        base: the base, which ``linear`` and ``slerp`` do without.
        settings: parameters of mergekit's method; text is read as YAML would, since command lines give text.
        out_dtype: the dtype to store.

    Raises:
        UsageError: mergekit has no such method.
        BadInput: a parameter that mergekit would pass over in silence.
    """
    if method not in METHODS:
        raise UsageError(f"mergekit has no {method}; leave out --backend, or use {', '.join(METHODS)}.")
    models: list[dict[str, Any]] = [{"model": str(folder.absolute())} for folder, _ in experts]
    document: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": {name: _plain(value) for name, value in settings.items()},
        "dtype": "float32",
        "out_dtype": out_dtype,
    }
    known = METHODS[method]
    if known.base == "first":
        document["base_model"] = models[0]["model"]
        document["parameters"].setdefault("t", experts[1][1])
    elif "weight" in known.of_experts:
        for model, (_, coefficient) in zip(models, experts, strict=True):
            model["parameters"] = {"weight": coefficient}
    if base is not None and known.base in ("origin", "centre"):
        document["base_model"] = str(base.absolute())
    parse_config(document)
    return document


def _plain(value: object) -> object:
    import yaml

    return yaml.safe_load(value) if isinstance(value, str) else value


def _with_models(document: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        return change(value) if key in _KEYS and isinstance(value, str) else value

    return {name: walk(value, name) for name, value in document.items()}
