"""Maps that were found by experiment: one JSON file per ``model_type``, read back for a checkpoint of any size.

A file lists templates of attention and feed-forward blocks. A tensor's name in one has ``{}`` in place of the number of
its layer or expert; a place or a size is a formula in the config's settings ("num_attention_heads") and in what was
computed before it ("groups * members * value_size"). A template may say "when" it holds: with which settings. One whose
tensors hold several matrices along their first axis ("sliced") stands for a block in each. Whatever no template names
is copied unchanged.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import (
    Attention,
    FeedForward,
    Heads,
    JoinedStream,
    Mixture,
    QueryKeyNorm,
    ScorePart,
)
from unmergeable.architecture.declare import Config, Names
from unmergeable.architecture.parts import is_of_a_tower, part_of
from unmergeable.architecture.rules import tensor_extents
from unmergeable.errors import UnsupportedArchitecture

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

FORMAT = "unmergeable-map/1"

RESIDUAL = "a derived map leaves the residual stream alone"


@dataclass(frozen=True)
class DerivedMap:
    """The proven map of one ``model_type``.

    ``prefix`` starts the names of the body's tensors in files of the whole network, and may be absent in those of the
    bare body. ``flags`` are the settings other than sizes that the map was proven with, a list where layers or the
    network classes differ that it was proven on;
    ``defaults`` holds sizes that a config may leave out. ``known`` are all names of tensors, without numbers.
    ``reasons`` says what was left alone, and why; ``proof`` what the map was tried on.
    """

    model_type: str
    network_class: str
    prefix: str
    attentions: tuple[Mapping[str, Any], ...]
    feed_forwards: tuple[Mapping[str, Any], ...]
    flags: Mapping[str, Any]
    defaults: Mapping[str, Any]
    known: tuple[str, ...]
    reasons: Mapping[str, str]
    proof: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DerivedMap:
        """Read back what :meth:`to_json` wrote.

        Raises:
            UnsupportedArchitecture: the document is no map of this format.
        """
        if document.get("format") != FORMAT or not set(cls.__dataclass_fields__) <= set(document):
            raise UnsupportedArchitecture(f"the map is not of format {FORMAT}; derive it again with `unmergeable map`.")
        values: dict[str, Any] = {name: document[name] for name in cls.__dataclass_fields__}
        return cls(**values | {name: tuple(values[name]) for name in ("attentions", "feed_forwards", "known")})


MAPS_VARIABLE = "UNMERGEABLE_MAPS"
"""Environment variable that names a folder of further maps, TYPE.json each."""


@cache
def shipped() -> tuple[str, ...]:
    """Every ``model_type`` whose derived map comes with this package."""
    return tuple(sorted(_stem(item.name) for item in _shipped_folder().iterdir() if item.name.endswith(".json")))


def known_map(model_type: str) -> DerivedMap | None:
    """The derived map of a type, shipped or in the folder that UNMERGEABLE_MAPS names; None where there is none.

    Raises:
        UnsupportedArchitecture: the file is no map.
    """
    folder = os.environ.get(MAPS_VARIABLE)
    file = Path(folder) / f"{model_type}.json" if folder and re.fullmatch(r"[\w.-]+", model_type) else None
    if file is not None and file.is_file():
        return _read(file.read_text(encoding="utf-8"), str(file))
    return _shipped_map(model_type) if model_type in shipped() else None


@cache
def _shipped_map(model_type: str) -> DerivedMap:
    file = _shipped_folder().joinpath(f"{model_type}.json")
    return _read(file.read_text(encoding="utf-8"), file.name)


def forget_shipped() -> None:
    """Read the package's maps again, after some were written."""
    shipped.cache_clear()
    _shipped_map.cache_clear()


def _shipped_folder() -> Traversable:
    return files("unmergeable.architecture").joinpath("maps")


def _stem(name: str) -> str:
    return name.removesuffix(".json")


def _read(text: str, place: str) -> DerivedMap:
    try:
        return DerivedMap.from_json(json.loads(text))
    except (ValueError, AttributeError, TypeError, RecursionError, UnsupportedArchitecture):
        raise UnsupportedArchitecture(
            f"{place} is no map of format {FORMAT}; derive it again with `unmergeable map`."
        ) from None


def architecture_of(derived: DerivedMap, config: Config, names: Names) -> Architecture:
    """The blocks of a checkpoint of this type, of whatever size.

    Raises:
        UnsupportedArchitecture: the config has other flags than the map was proven with, no block of the map is in the
            checkpoint, or one of its modules holds a tensor that the network the map was proven on does not have.
    """
    derived = _without_strange_towers(derived, config)
    prefix = _change(derived, names)
    scope = _settings(config, derived.defaults)
    blocks: list[Attention | FeedForward] = []
    mixtures: list[Mixture] = []
    for template in (*derived.attentions, *derived.feed_forwards):
        own = list(_instances(template, config, scope, names, prefix))
        blocks += own
        if "mixture" in template:
            mixtures += _mixtures(template["mixture"], own, prefix)
    if not blocks:
        raise UnsupportedArchitecture(
            f"none of the blocks that a {derived.model_type} model has is in the checkpoint; it does not hold the "
            "network its config names."
        )
    _require_known(derived, blocks, names, prefix)
    return Architecture(
        derived.model_type, tuple(blocks), (r".*",), mixtures=tuple(mixtures), missing={"residual": RESIDUAL}
    )


@dataclass(frozen=True)
class _Change:
    """How names in a checkpoint differ from those of a map: ``old`` at the start is ``new``, then ``towers`` follow.

    Each of ``towers`` is the start of a tower's names with and without the module that older files have around it.
    """

    old: str = ""
    new: str = ""
    towers: tuple[tuple[str, str], ...] = ()

    def __call__(self, name: str) -> str:
        if name.startswith(self.old):
            name = self.new + name.removeprefix(self.old)
        for before, after in self.towers:
            if name.startswith(before):
                return after + name.removeprefix(before)
        return name


_AROUND = "vision_model."
"""A module around the tower, which files have or have not, as the version of transformers had it that wrote them."""


def _change(derived: DerivedMap, names: Names) -> _Change:
    """What templates' names start with, and what stands there in this checkpoint."""
    anchors = [template["output" if "output" in template else "down"]["weight"] for template in _templates(derived)]

    def count(change: _Change) -> int:
        patterns = [re.compile(_pattern(change(anchor))) for anchor in anchors]
        return sum(any(pattern.fullmatch(name) for pattern in patterns) for name in names.shapes)

    bare = ("", derived.prefix, "model.", "language_model.", "model.language_model.", "language_model.model.")
    options = [("", ""), *((derived.prefix, other) for other in bare), *(("", other) for other in bare)]
    best = max((_Change(old, new) for old, new in dict.fromkeys(options)), key=count)
    for root in dict.fromkeys(map(_tower_root, map(best, anchors))):
        inside = root + _AROUND
        wrapped, bared = (replace(best, towers=(*best.towers, pair)) for pair in ((root, inside), (inside, root)))
        best = max((best, wrapped, bared), key=count) if root else best
    return best


def _tower_root(name: str) -> str:
    """What the names of a tower's tensors start with; empty for a tensor of no tower."""
    words = name.split(".")
    place = next((place for place, word in enumerate(words[:-1]) if is_of_a_tower(word)), None)
    return "" if place is None else ".".join(words[: place + 1]) + "."


def _templates(derived: DerivedMap) -> tuple[Mapping[str, Any], ...]:
    return (*derived.attentions, *derived.feed_forwards)


def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\{\}", r"(\d+)")


def _settings(config: Config, defaults: Mapping[str, Any]) -> dict[str, float]:
    """Every number in a config by its dotted name, and by the last part of it: older files nest settings elsewhere."""
    found = numbers(config)
    for name, value in numbers(config).items():
        found.setdefault(name.rsplit(".", 1)[-1], value)
    for name, value in defaults.items():
        found.setdefault(name, found.get(name.rsplit(".", 1)[-1], value))
    return found


def numbers(settings: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number in nested settings, by its dotted name."""
    found: dict[str, float] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


def of_layer(settings: Mapping[str, Any], numbers_in_name: tuple[int, ...]) -> dict[str, float]:
    """The entries for one layer of settings that list a number for each, by the setting's name and ``[layer]``.

    The first number in a block's name counts. Settings of one layer alone, in a table by the layers' numbers, have
    their own names.
    """
    own: dict[str, float] = {}
    for table in settings.values():
        if numbers_in_name and isinstance(table, Mapping) and all(str(name).isdigit() for name in table):
            parts = [part for name, part in table.items() if int(name) == numbers_in_name[0]]
            own |= numbers(parts[0]) if parts and isinstance(parts[0], Mapping) else {}
    lists = {name: value for name, value in settings.items() if isinstance(value, (list, tuple)) and numbers_in_name}
    found = {name: value[numbers_in_name[0]] for name, value in lists.items() if len(value) > numbers_in_name[0]}
    return own | {f"{name}[layer]": value for name, value in found.items() if type(value) in (int, float)}


def evaluate(formula: str | int, scope: Mapping[str, float]) -> int:
    """A sum or difference of products and quotients of names and numbers, as a whole number.

    Raises UnsupportedArchitecture for a name that is not in ``scope``, or a result that is not whole.
    """
    total = 0.0
    for term in re.split(r" (?=[+-] )", str(formula)):
        value = -1.0 if term.startswith("- ") else 1.0
        for sign, factor in re.findall(r"([*/]?)\s*([\w.\[\]]+)", term):
            try:
                number = float(factor) if factor[0].isdigit() else float(scope[factor])
                value = value / number if sign == "/" else value * number
            except (KeyError, ZeroDivisionError):
                raise UnsupportedArchitecture(
                    f"config.json gives no usable {factor!r}, which this map needs; add it."
                ) from None
        total += int(value)
    return int(total)


def _instances(
    template: Mapping[str, Any], config: Config, scope: Mapping[str, float], names: Names, change: _Change
) -> Iterator[Attention | FeedForward]:
    """A template's blocks: one for every number under which its last tensor is stored."""
    if any(not _is_among(_setting(config, name), value) for name, value in template.get("when", {}).items()):
        return
    is_attention = "output" in template
    anchor = template["output" if is_attention else "down"]
    pattern = re.compile(_pattern(change(anchor["weight"])))
    matches = (pattern.fullmatch(name) for name in names.shapes)
    numbers = sorted({tuple(map(int, match.groups())) for match in matches if match})
    if is_attention:
        numbers = _with_own_values(numbers, config)
    if anchor.get("sliced"):  # a block for every slice of the tensor
        name = change(anchor["weight"])
        numbers = [(*own, index) for own in numbers for index in range(names.shapes[name.format(*own)][0])]
    for number in numbers:
        reader = _Reader(names, change, number, {**scope, **of_layer(config, number)})
        yield reader.attention(template) if is_attention else reader.feed_forward(template)


def _mixtures(data: Mapping[str, Any], blocks: Iterable[Attention | FeedForward], change: _Change) -> Iterator[Mixture]:
    """The mixtures that experts in slices of the same tensors make up, in the order of the slices."""
    experts: dict[tuple[str, ...], list[str]] = {}
    for block in blocks:
        numbers = tuple(word for word in block.name.split(".") if word.isdigit())
        experts.setdefault(numbers[:-1], []).append(block.name)
    for number, own in experts.items():

        def named(template: str, number: tuple[str, ...] = number) -> str:
            return change(template).format(*number)

        yield Mixture(
            name=named(data["name"]),
            router=named(data["router"]),
            router_bias=named(data["router_bias"]) if data.get("router_bias") else None,
            experts=tuple(own),
            stacks=(),
            others=tuple(map(named, data["others"])),
        )


def _with_own_values(numbers: list[tuple[int, ...]], config: Config) -> list[tuple[int, ...]]:
    """The layers whose values no other layer reads, of attentions by their ``numbers``.

    As many of the last layers as the config lets share read those of the last layer of their kind before them. Files
    may hold values of theirs all the same, which nothing reads.
    """
    text = config if "num_kv_shared_layers" in config else config.get("text_config") or {}
    shared = int(text.get("num_kv_shared_layers") or 0)
    if not shared:
        return numbers
    kinds = text.get("layer_types") or ()

    def kind(number: tuple[int, ...]) -> object:
        return kinds[number[0]] if number and number[0] < len(kinds) else None

    first = int(text.get("num_hidden_layers") or 0) - shared
    makers = [own for own in numbers if own and own[0] < first]
    readers = [own for own in numbers if own not in makers]
    read = [max((own for own in makers if kind(own) == kind(reader)), default=None) for reader in readers]
    return [own for own in makers if own not in read]


@dataclass
class _Reader:
    """One instance of a template: its numbers are filled into names, its formulas evaluated in order."""

    names: Names
    change: _Change
    number: tuple[int, ...]
    scope: dict[str, float]

    def name(self, template: str) -> str:
        return self.change(template).format(*self.number)

    def length(self, heads: Mapping[str, Any]) -> int:
        shape = self.names.shapes.get(self.name(heads["weight"]), ())
        return shape[heads["axis"]] if len(shape) > heads["axis"] else 0

    def value(self, name: str, formula: str | int) -> int:
        result = evaluate(formula, self.scope)
        self.scope[name] = result
        return result

    def heads(self, data: Mapping[str, Any]) -> Heads:
        bias = self.names.optional(self.name(data["bias"])) if data.get("bias") else None
        places = {key: evaluate(data.get(key, 0), self.scope) for key in ("offset", "group_stride", "member_stride")}
        return Heads(
            self.name(data["weight"]),
            bias,
            data["axis"],
            **places,
            element_stride=data.get("element_stride", 1),
            slice=self.number[-1] if data.get("sliced") else None,
        )

    def attention(self, data: Mapping[str, Any]) -> Attention:
        self.scope["rows"], self.scope["columns"] = self.length(data["value"]), self.length(data["output"])
        counts = {name: self.value(name, data[name]) for name in data if name in {"groups", "members", "value_size"}}
        for index, part in enumerate(data["parts"]):
            size = self.value(f"part_{index}", part["size"])
            if size % 2 and (part["rotary"] or data.get("norm")):
                raise UnsupportedArchitecture(
                    f"tensor {self.name(part['query']['weight'])}: config.json implies {size} coordinates that go in "
                    "pairs; config.json and weights do not belong together."
                )
        self.scope["query_size"] = sum(self.scope[f"part_{index}"] for index in range(len(data["parts"])))
        parts = [
            ScorePart(
                self.heads(part["query"]),
                self.heads(part["key"]),
                int(self.scope[f"part_{index}"]),
                part["rotary"],
                part["shared_key"],
            )
            for index, part in enumerate(data["parts"])
        ]
        return Attention(
            name=self.name(data["name"]),
            groups=counts["groups"],
            members=counts["members"],
            parts=tuple(parts),
            value=self.heads(data["value"]),
            output=self.heads(data["output"]),
            value_size=counts["value_size"],
            position=data["position"],
            norm=self.norm(data["norm"]) if data.get("norm") else None,
            is_cross=data["is_cross"],
            heads_limit=data["heads_limit"],
            value_group=data["value_group"],
            joined=tuple(map(self.joined, data.get("joined", ()))),
        )

    def joined(self, data: Mapping[str, Any]) -> JoinedStream:
        output = data.get("output")
        if output is not None and output.get("optional") and self.name(output["weight"]) not in self.names.shapes:
            output = None  # in some layers nothing reads what this stream gathers
        return JoinedStream(
            queries=tuple(map(self.heads, data["queries"])),
            keys=tuple(map(self.heads, data["keys"])),
            value=self.heads(data["value"]),
            output=self.heads(output) if output else None,
            norm=self.norm(data["norm"]) if data.get("norm") else None,
        )

    def norm(self, data: Mapping[str, Any]) -> QueryKeyNorm:
        return QueryKeyNorm(
            kind=data["kind"],
            scope=data["scope"],
            epsilon=data["epsilon"],
            query_gains=tuple(map(self.name, data["query_gains"])),
            key_gains=tuple(map(self.name, data["key_gains"])),
            query_bias=self.name(data["query_bias"]) if data["query_bias"] else None,
            key_bias=self.name(data["key_bias"]) if data["key_bias"] else None,
            gain_axis=data["gain_axis"],
            offset=data["offset"],
        )

    def feed_forward(self, data: Mapping[str, Any]) -> FeedForward:
        self.scope["columns"], self.scope["rows"] = self.length(data["down"]), self.length(data["up"])
        size = self.value("units", data.get("size", "columns"))
        return FeedForward(
            name=self.name(data["name"]),
            size=size,
            up=self.heads(data["up"]),
            down=self.heads(data["down"]),
            gate=self.heads(data["gate"]) if data.get("gate") else None,
            activation=data["activation"],
            scale_limit=data["scale_limit"],
            along=tuple(map(self.heads, data.get("along", ()))),
        )


def flags_of(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every setting that is no size, by its dotted name: switches, words, and the distinct entries of lists of them.

    Left out are those that no block's groups depend on: names, tokens, data types, how positions are stretched.
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NO_FLAGS or str(name).startswith("_") or name.endswith(("_token_id", "_token")):
            continue
        if isinstance(value, Mapping):
            found |= flags_of(value, f"{prefix}{name}.")
        elif isinstance(value, (bool, str)):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, (bool, str)) for item in value):
            found[f"{prefix}{name}"] = sorted(set(map(str, value)))
    return found


_NO_FLAGS = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "model_type", "name_or_path", "use_cache",
    "return_dict", "id2label", "label2id", "problem_type", "tie_word_embeddings", "rope_parameters", "rope_scaling",
    "output_attentions", "output_hidden_states", "tokenizer_class", "summary_type", "quantization_config", "auto_map",
}  # fmt: skip


def _setting(config: Config, name: str) -> Any:
    """A setting by its dotted name; None where it is not given."""
    found: Any = config
    for word in name.split("."):
        found = found.get(word) if isinstance(found, Mapping) else None
    return found


def _without_strange_towers(derived: DerivedMap, config: Config) -> DerivedMap:
    """The map without the towers that are put together in another way than those that it was proven on.

    Raises:
        UnsupportedArchitecture: all that the map has is put together differently.
    """
    given = flags_of(config)
    given |= {name: kind for name in derived.flags if name.endswith(".model_type") and (kind := _setting(config, name))}
    strange = {name: value for name, value in given.items() if not _is_proven(derived, name, value)}
    left_alone = {part_of(name) for name in strange if is_of_a_tower(name)}
    own = {role: tuple(t for t in getattr(derived, role) if _part(t) not in left_alone) for role in _ROLES}
    lacking = next((name for name in strange if not is_of_a_tower(name) or not any(own.values())), None)
    if lacking is not None:
        raise UnsupportedArchitecture(
            f"config.json: {lacking} is {strange[lacking]!r}, and the map of {derived.model_type} was proven with "
            f"{derived.flags[lacking]!r}; derive one for this model with `unmergeable map` and put it into the folder "
            f"{MAPS_VARIABLE} names."
        )
    return replace(derived, **own)  # type: ignore[arg-type]


_ROLES = ("attentions", "feed_forwards")


def _part(template: Mapping[str, Any]) -> str:
    return part_of(template["output" if "output" in template else "down"]["weight"])


def _is_proven(derived: DerivedMap, name: str, value: Any) -> bool:
    """Whether a flag is one that the map was proven with, or of which it knows nothing."""
    proven = derived.flags.get(name)
    if proven is None or _is_among(value, proven):
        return True
    # Whatever is not ReLU lets the same through.
    return name.endswith(("_act", "activation", "activation_function")) and "relu" not in f"{value} {proven}"


def _is_among(value: Any, proven: Any) -> bool:
    """Whether a flag is one that a map was proven with: the same, or of several; of a list, every entry."""
    if value == proven or not isinstance(proven, list):
        return bool(value == proven)
    return set(value) <= set(proven) if isinstance(value, list) else value in proven


def _require_known(derived: DerivedMap, blocks: list[Attention | FeedForward], names: Names, change: _Change) -> None:
    """Refuse a tensor beside a block's own that the small network did not have: it may read what is changed."""
    known = {change(name) for name in derived.known}
    owned = set(tensor_extents(Architecture(derived.model_type, tuple(blocks)).symmetry))
    modules = {name.rsplit(".", 2)[0] + "." for name in owned}
    for name in names.shapes:
        bare = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name)
        if bare not in known and name not in owned and any(name.startswith(module) for module in modules):
            raise UnsupportedArchitecture(
                f"tensor {name} is not in the network that the map of {derived.model_type} was proven on; changing the "
                "tensors around it could break the model, so nothing is done. Please report the model."
            )
