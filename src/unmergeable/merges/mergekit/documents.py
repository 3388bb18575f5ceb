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
from unmergeable.merges.vocabularies import Tokenizer, TokenSource
from unmergeable.yaml_text import parse_yaml

_KEYS = ("model", "base_model")
_NO_MODELS = ("base", "union")


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


def open_model(model: str, folder: Path, *, allow_pickle: bool | None = None) -> TensorSource:
    """Open a model by the name it has in a configuration that lies in ``folder``.

    Raises:
        BadInput: when there is no such folder.
    """
    path, adapter = split_adapter(model, folder)
    for part in (path, adapter):
        if part is not None and not part.is_dir():
            raise BadInput(f"model {model}: {part} is no folder; download the model and give its folder.")
    if adapter is None:
        return open_checkpoint(path, allow_pickle=allow_pickle)
    return open_checkpoint(adapter, base=path, allow_pickle=allow_pickle)


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
        "parameters": {name: _plain(name, value) for name, value in settings.items()},
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


def with_donor(document: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose merge takes its ``config.json`` and tokenizer from the first model.

    Where the base is a model like the others and none is named, mergekit takes them from any of the models: which one
    differs from run to run. Naming the first changes nothing else.
    """
    config = parse_config(document)
    if config.base_model is not None or METHODS[config.merge_method].base != "expert":
        return dict(document)
    return {**document, "base_model": config.models[0]}


def tokenizer_document(tokenizer: Tokenizer, document: Mapping[str, Any]) -> dict[str, Any]:
    """The ``tokenizer`` of a configuration that merges the experts of ``document``."""

    def model(number: str | int) -> str:
        return str(document["base_model"] if number == "base" else document["models"][int(number) - 1]["model"])

    def source(token: TokenSource) -> Any:
        if token.model is None:
            return {"kind": "zero"}
        if token.token is None and token.row is None:
            return model(token.model)
        named = {"token": token.token} if token.row is None else {"token_id": token.row}
        return {"kind": "model_token", "model": model(token.model), **named}

    chosen = tokenizer.source if tokenizer.source in ("base", "union") else model(tokenizer.source)
    tokens = {token: {"source": source(entry), "force": entry.force} for token, entry in tokenizer.tokens.items()}
    return {"source": chosen, **({"tokens": tokens} if tokens else {})}


def _plain(name: str, value: object) -> object:
    return parse_yaml(value, f"setting {name}") if isinstance(value, str) else value


def _with_models(document: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    def walk(value: Any, key: str = "") -> Any:
        if key == "tokenizer_source" and isinstance(value, str) and value not in _NO_MODELS:
            return change(value)
        if key == "tokenizer" and isinstance(value, dict):
            return _tokenizer_models(value, change)
        if isinstance(value, dict):
            return {name: walk(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        return change(value) if key in _KEYS and isinstance(value, str) else value

    return {name: walk(value, name) for name, value in document.items()}


def _tokenizer_models(tokenizer: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A ``tokenizer`` with the models that it names changed: the source, and those of single tokens."""

    def changed(source: Any) -> Any:
        if isinstance(source, str):
            return source if source in _NO_MODELS else change(source)
        if isinstance(source, dict) and isinstance(source.get("model"), str):
            return {**source, "model": change(source["model"])}
        return source

    result = {key: changed(value) if key == "source" else value for key, value in tokenizer.items()}
    tokens = result.get("tokens")
    if isinstance(tokens, dict):
        result["tokens"] = {
            token: {**entry, "source": changed(entry.get("source"))} if isinstance(entry, dict) else entry
            for token, entry in tokens.items()
        }
    return result
