"""The models that a mergekit configuration names: folders relative to its own, or ``folder+adapter``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput

_KEYS = ("model", "base_model")


def models_named(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Every model a configuration names, once each."""
    found: dict[str, None] = {}
    _with_models(document, lambda model: found.setdefault(model) or model)
    return tuple(found)


def absolute_paths(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with every model's path made absolute; relative ones start at ``folder``."""

    def absolute(model: str) -> str:
        path, adapter = _split(model, folder)
        return str(path.absolute()) if adapter is None else f"{path.absolute()}+{adapter.absolute()}"

    return _with_models(document, absolute)


def open_model(model: str, folder: Path) -> TensorSource:
    """Open a model by the name it has in a configuration that lies in ``folder``.

    Raises:
        BadInput: when there is no such folder.
    """
    path, adapter = _split(model, folder)
    for part in (path, adapter):
        if part is not None and not part.is_dir():
            raise BadInput(f"model {model}: {part} is no folder; download the model and give its folder.")
    return open_checkpoint(path) if adapter is None else open_checkpoint(adapter, base=path)


def _split(model: str, folder: Path) -> tuple[Path, Path | None]:
    if "+" not in model or (folder / model).exists():
        return folder / model, None
    path, adapter = model.split("+", 1)
    return folder / path, folder / adapter


def _with_models(document: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        return change(value) if key in _KEYS and isinstance(value, str) else value

    return {name: walk(value, name) for name, value in document.items()}
