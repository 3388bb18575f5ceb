"""mergekit's YAML: read it, and say what it means for the merges of this package.

    models:                                   # or slices: [{sources: [{model, layer_range: [0, 12]}, …]}, …]
      - model: ./mathematician                # a folder, relative to the file; folder+adapter for a LoRA,
                                              # or {model: {path: ./folder}, lora: {path: ./adapter}}
        parameters: {weight: [0.2, 0.8]}      # a gradient over the layers
      - model: ./programmer
        parameters:
          weight:
            - {filter: mlp, value: 0.5}       # tensors whose name holds "mlp"
            - {value: 0.3}                    # all others
    merge_method: ties
    base_model: ./base
    parameters: {density: 0.5, normalize: true}
    dtype: float32
    out_dtype: bfloat16

A value is looked up in the source, its slice, and the whole, in that order; a list of filters that matches nothing is
passed over. A gradient is interpolated over the layers of its slice: layer i of n is at i / (n - 1), everything before
and behind the layers at 0. So it is in mergekit, and the methods are run in mergekit's variants (``docs/merging.md``
has the table), so that one file means one merge.

``slices`` put layers of models one behind another, which may be others in each slice:

    slices:
      - sources: [{model: ./mathematician, layer_range: [0, 24]}]
      - sources: [{model: ./programmer, layer_range: [8, 32]}]
    merge_method: passthrough

Stricter than mergekit: an unknown key is refused, a typo never passes. Not offered: several ``modules``, and
vocabularies padded to a multiple.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from unmergeable.errors import BadInput
from unmergeable.merges.mergekit.methods import METHODS
from unmergeable.settings import nearest
from unmergeable.yaml_text import parse_yaml

DTYPES = ("bfloat16", "float16", "float32", "float64")
USE_MERGEKIT = "run mergekit itself with --backend mergekit"

_TOP = (
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_FORMS = ("models", "slices", "modules")
_NAMES_OF_MODELS = ("model", "base_model", "tokenizer_source", "source")
_IGNORED = ("int8_mask",)
"""Accepted without effect: how mergekit stores a mask changes nothing of the merge. (So is a ``name`` at the top.)"""


@dataclass(frozen=True)
class Filtered:
    """A value, or a gradient of them, for the tensors whose name holds ``filter`` (None: all)."""

    gradient: tuple[float, ...]
    filter: str | None = None

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name

    def at(self, t: float) -> float:
        """The value at ``t`` from 0 to 1, interpolated between its neighbours."""
        position = t * (len(self.gradient) - 1)
        below = int(position)
        above = min(below + 1, len(self.gradient) - 1)
        return (1 - (position - below)) * self.gradient[below] + (position - below) * self.gradient[above]


Setting = tuple[Filtered, ...]
"""One parameter: the first entry that matches a tensor holds."""

Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """A model as it is written in the file, with its own parameters; its layers from ``first`` on take part."""

    model: str
    parameters: Parameters = field(default_factory=dict)
    first: int = 0


@dataclass(frozen=True)
class Slice:
    """Layers ``first`` to ``stop`` of the merge; ``stop`` None means all.

    ``module`` are the parameters of the module it lies in, if one is named; ``base_model`` is None where it is that of
    the whole.
    """

    sources: tuple[Source, ...]
    parameters: Parameters = field(default_factory=dict)
    module: Parameters = field(default_factory=dict)
    first: int = 0
    stop: int | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class NamedToken:
    """Where the row of a token comes from: a model, None for zeros, and there a token or row of another name."""

    model: str | None
    token: str | None = None
    row: int | None = None
    force: bool = False


@dataclass(frozen=True)
class NamedTokenizer:
    """Whose tokens the merge has: ``base``, ``union`` or a model; single ones. Models as the file names them."""

    source: str
    tokens: Mapping[str, NamedToken] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeConfig:
    """A merge as its file describes it."""

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    tokenizer: NamedTokenizer | None = None
    chat_template: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models in the order in which they are listed, once each."""
        return tuple(dict.fromkeys(source.model for part in self.slices for source in part.sources))

    @property
    def stored_dtype(self) -> str | None:
        """The dtype of the merge on disk; None for that of the models."""
        return self.out_dtype or self.dtype


def read_config(path: Path) -> MergeConfig:
    """Read a configuration file.

    Raises:
        BadInput: naming the file, the key and what is wrong with it.
    """
    document = read_document(path)
    try:
        return parse_config(document)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def read_document(path: Path) -> Mapping[str, Any]:
    """Read a configuration file without asking what its keys mean.

    Raises:
        BadInput: when it cannot be read, is no YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); give a mergekit configuration file.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not valid YAML: it is not UTF-8 text; convert it.") from error
    try:
        document = parse_yaml(text, str(path), _strict_loader())
    except BadInput as error:
        if "expected a single document" not in str(error):
            raise
        raise BadInput(
            f"{path} holds several documents, as mergekit-multi takes them: write each into a file of its own, merge "
            "them in their order, and name the folders of earlier merges as models."
        ) from None
    if not isinstance(document, dict):
        raise BadInput(f"{path} is no configuration: it holds {type(document).__name__}, not keys and values.")
    try:
        _write_models_as_text(document)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return document


def _write_models_as_text(document: dict[Any, Any]) -> None:
    """Put text in the place of models that are written as mappings, anywhere in a configuration.

    Each of its mappings is looked at once, however often aliases repeat it.
    """
    seen: set[int] = set()
    left: list[Any] = [document]
    while left:
        part = left.pop()
        if id(part) in seen or not isinstance(part, dict | list):
            continue
        seen.add(id(part))
        if isinstance(part, list):
            left += part
            continue
        for key, value in part.items():
            # The source of a token is a mapping too, which says of what kind it is.
            is_token = key == "source" and isinstance(value, dict) and "kind" in value
            if key in _NAMES_OF_MODELS and isinstance(value, dict) and not is_token:
                part[key] = _model_as_text(value, str(key))
            else:
                left.append(value)


def _model_as_text(model: Mapping[str, Any], where: str) -> str:
    """``folder`` or ``folder+adapter`` for ``{model: {path: folder}, lora: {path: adapter}}``, mergekit's long form.

    Raises:
        BadInput: for a revision, or another key.
    """
    fields = _mapping(model, where, ("model", "lora"))
    paths = []
    for name in ("model", "lora"):
        path = fields.get(name)
        if isinstance(path, dict):
            if path.get("revision") is None:
                path = {key: entry for key, entry in path.items() if key != "revision"}
            path = _mapping(path, f"{where}, {name}", ("path",)).get("path")
        if isinstance(path, str):
            paths.append(path)
        elif path is not None or name == "model":
            raise BadInput(f"{where}, {name}: must name a folder, as in {{path: ./mine}}, not {fields.get(name)!r}.")
    return "+".join(paths)


def parse_config(document: object) -> MergeConfig:
    """The configuration of a parsed file.

    Raises:
        BadInput: naming the key and what is wrong with it.
    """
    if isinstance(document, dict) and "experts" in document:
        raise BadInput("the file makes a mixture of experts, which is no merge of weights: run mergekit-moe with it.")
    if isinstance(document, dict) and "genome" in document:
        raise BadInput(
            "the file searches for a merge: run mergekit-evolve with it, and give the best_config.yaml that it writes."
        )
    top = _mapping(document, "the file", _TOP)
    method = _text(top, "merge_method", "the file")
    if method is None:
        raise BadInput("merge_method is missing; name one, e.g. merge_method: ties")
    if method not in METHODS:
        raise BadInput(f"merge_method {method!r} is not offered here{nearest(method, METHODS)} Or {USE_MERGEKIT}.")
    if sum(form in top for form in _FORMS) != 1:
        raise BadInput("give either models or slices.")
    base_model = _text(top, "base_model", "the file")
    config = MergeConfig(
        merge_method=method,
        slices=_module(top["modules"], method) if "modules" in top else _form(top, method),
        base_model=base_model,
        parameters=_parameters(top.get("parameters"), "parameters", method),
        dtype=_dtype(top, "dtype"),
        out_dtype=_dtype(top, "out_dtype"),
        tokenizer=_tokenizer(top),
        chat_template=_text(top, "chat_template", "the file"),
    )
    _require_distinct(config)
    return config


def _form(fields: Mapping[str, Any], method: str, module: Parameters | None = None) -> tuple[Slice, ...]:
    if "models" in fields:
        return _whole(fields["models"], method, module or {})
    return _slices(fields["slices"], method, module or {})


def _module(modules: object, method: str) -> tuple[Slice, ...]:
    """The slices of the only module of a language model, as the files that mergekit writes itself have them."""
    if not isinstance(modules, dict) or len(modules) != 1:
        raise BadInput(f"modules: only those of one module are merged here; {USE_MERGEKIT}.")
    ((name, fields),) = modules.items()
    where = f"modules, {name}"
    fields = _mapping(fields, where, ("models", "slices", "parameters"))
    if ("models" in fields) == ("slices" in fields):
        raise BadInput(f"{where}: give either models or slices.")
    return _form(fields, method, _parameters(fields.get("parameters"), f"{where}, parameters", method))


def _tokenizer(top: Mapping[str, Any]) -> NamedTokenizer | None:
    source = _text(top, "tokenizer_source", "the file")
    if "tokenizer" not in top:
        return None if source is None else NamedTokenizer(source)
    if source is not None:
        raise BadInput("give either tokenizer_source or tokenizer.")
    if top["tokenizer"] is None:
        return None
    fields = _mapping(top["tokenizer"], "tokenizer", ("source", "tokens"), elsewhere=("pad_to_multiple_of",))
    entries = _mapping(fields.get("tokens") or {}, "tokenizer, tokens", tuple(fields.get("tokens") or ()))
    tokens = {str(token): _token(entry, f"tokenizer, tokens, {token}") for token, entry in entries.items()}
    return NamedTokenizer(_text(fields, "source", "tokenizer") or "union", tokens)


def _token(entry: object, where: str) -> NamedToken:
    fields = _mapping(entry, where, ("source", "force"))
    force = fields.get("force", False)
    if not isinstance(force, bool):
        raise BadInput(f"{where}: force must be true or false, not {force!r}.")
    source = fields.get("source")
    if isinstance(source, str):
        return NamedToken(source, force=force)
    inner = _mapping(source, f"{where}, source", ("kind", "model", "token", "token_id"))
    if inner.get("kind") == "zero":
        return NamedToken(None, force=force)
    model, token, row = (_text(inner, "model", where), _text(inner, "token", where), inner.get("token_id"))
    if inner.get("kind") != "model_token" or model is None or (token is None) == (type(row) is not int):
        raise BadInput(f"{where}: source must be a model, {{kind: zero}}, or kind: model_token with token or token_id.")
    return NamedToken(model, token, row, force)


def _whole(entries: object, method: str, module: Parameters) -> tuple[Slice, ...]:
    sources = []
    for number, entry in enumerate(_list(entries, "models"), start=1):
        where = f"models, entry {number}"
        sources.append(_source(_mapping(entry, where, ("model", "parameters")), where, method))
    return (Slice(tuple(sources), module=module),)


def _slices(entries: object, method: str, module: Parameters) -> tuple[Slice, ...]:
    slices: list[Slice] = []
    position = 0
    for number, entry in enumerate(_list(entries, "slices"), start=1):
        where = f"slices, entry {number}"
        part = _mapping(entry, where, ("sources", "parameters", "base_model"), elsewhere=("residual_weight",))
        sources, lengths = [], set()
        for index, source in enumerate(_list(part.get("sources"), f"{where}, sources"), start=1):
            inner = f"{where}, source {index}"
            fields = _mapping(source, inner, ("model", "layer_range", "parameters"))
            first, stop = _range(fields.get("layer_range"), inner)
            sources.append(_source(fields, inner, method, first))
            lengths.add(stop - first)
        if len(lengths) > 1:
            raise BadInput(f"{where}: the layer_range of all sources must hold the same number of layers.")
        own = _parameters(part.get("parameters"), f"{where}, parameters", method)
        stop = position + lengths.pop()
        base_model = _text(part, "base_model", where)
        slices.append(Slice(tuple(sources), own, module, position, stop, base_model))
        position = stop
    return tuple(slices)


def _source(fields: Mapping[str, Any], where: str, method: str, first: int = 0) -> Source:
    model = _text(fields, "model", where)
    if model is None:
        raise BadInput(f"{where}: model is missing; name a folder.")
    parameters = _parameters(fields.get("parameters"), f"{where}, parameters", method)
    for name in METHODS[method].of_merge:
        if name in parameters:  # mergekit would pass over it
            raise BadInput(
                f"{where}: {name} is shared by all models; put it in the parameters of a slice or at the top."
            )
    return Source(model, parameters, first)


def _range(value: object, where: str) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value):
        first, stop = value
        if 0 <= first < stop:
            return first, stop
    raise BadInput(f"{where}: layer_range must be two whole numbers, as in [0, 12], not {value!r}.")


def _require_distinct(config: MergeConfig) -> None:
    for part in config.slices:
        listed = [source.model for source in part.sources]
        if len(set(listed)) < len(listed):
            raise BadInput(f"{max(listed, key=listed.count)} is listed twice; list each model once.")


def _parameters(value: object, where: str, method: str) -> Parameters:
    if value is None:
        return {}
    known = METHODS[method]
    names = (*known.of_experts, *known.of_merge, *known.switches, *_IGNORED)
    return {
        name: (_switch_setting if name in (*known.switches, *_IGNORED) else _setting)(setting, f"{where}, {name}")
        for name, setting in _mapping(value, where, names, what=f"parameter of {method}").items()
    }


def _setting(value: object, where: str) -> Setting:
    entries = value if isinstance(value, list) and any(isinstance(entry, dict) for entry in value) else [value]
    return tuple(_filtered(entry, where) for entry in entries)


def _filtered(entry: object, where: str) -> Filtered:
    if not isinstance(entry, dict):
        return Filtered(_gradient(entry, where))
    fields = _mapping(entry, where, ("filter", "value"))
    if "value" not in fields:
        raise BadInput(f"{where}: a filter needs a value.")
    return Filtered(_gradient(fields["value"], where), _text(fields, "filter", where))


def _gradient(value: object, where: str) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        # YAML takes 1e-3 for text; true and false are no numbers.
        numbers = tuple(float(str(number)) for number in values)
    except ValueError:
        numbers = ()
    if not numbers:
        raise BadInput(f"{where}: must be a number or a list of numbers, not {value!r}.")
    return numbers


def _switch_setting(value: object, where: str) -> Setting:
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return (Filtered((float(value),)),)
    raise BadInput(f"{where}: must be true or false, not {value!r}; it holds for the whole merge.")


def _dtype(top: Mapping[str, Any], key: str) -> str | None:
    dtype = _text(top, key, "the file")
    if dtype is not None and dtype not in DTYPES:
        raise BadInput(f"{key}: must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    return dtype


def _mapping(
    value: object, where: str, known: Sequence[str], *, elsewhere: Sequence[str] = (), what: str = "key"
) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{where}: must be a mapping of {', '.join(known)}, not {value!r}.")
    for key in value:
        if key in elsewhere:
            raise BadInput(f"{where}: {key} is not offered here; {USE_MERGEKIT}.")
        if key not in known:
            raise BadInput(f"{where}: no {what} is called {key!r}{_instead(str(key), known)}")
    return value


def _instead(key: str, known: Sequence[str]) -> str:
    """What to do about an unknown key."""
    if key == "revision":
        return "; download that revision, and name its folder as model."
    is_parameter = any(key in (*m.of_experts, *m.of_merge, *m.switches, *_IGNORED) for m in METHODS.values())
    if is_parameter and "parameters" in known:
        return "; it is a parameter: put it under parameters."
    if is_parameter:
        return f"; leave it out (it has no effect there in mergekit). Known: {', '.join(known) or 'none'}."
    if key in _TOP:
        return "; it stands at the top of the file: put it there."
    if known == _TOP and not get_close_matches(key, known):
        return f"; leave it out (mergekit passes over it). Known: {', '.join(known)}."
    return nearest(key, dict.fromkeys(known))


def _list(value: object, where: str) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    raise BadInput(f"{where}: must be a list of at least one entry.")


def _text(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    value = fields.get(key)
    if value is None or isinstance(value, str):
        return value
    raise BadInput(f"{where}: {key} must be text, not {value!r}.")


def _strict_loader() -> Any:
    """PyYAML's safe loader, which lets a key be given twice and keeps the last, made to refuse that."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            merged_in = "tag:yaml.org,2002:merge"
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merged_in]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return StrictLoader
