"""From the blocks of two small networks to templates that hold for every size.

Both are derived from one kind of config with other numbers; a number in a map becomes the formula that gives it in
both: a setting of the config, a quotient of two, or a sum of products of the numbers found before it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from unmergeable.architecture.blocks import Attention, FeedForward, Heads, JoinedStream, QueryKeyNorm
from unmergeable.architecture.derived import DerivedMap, evaluate, flags_of, numbers, of_layer
from unmergeable.architecture.parts import is_of_a_tower, part_of
from unmergeable.architecture.rules import symmetry_map
from unmergeable.derivation.attentions import NOT_UNDERSTOOD
from unmergeable.derivation.build import Specimen
from unmergeable.derivation.derive import Block, Derivation, without_numbers
from unmergeable.derivation.scene import Unexplained
from unmergeable.derivation.shrink import COUNTS_OF_HEADS, SIZES_OF_HEADS, SIZES_OF_ONE_HEAD
from unmergeable.network.disk_weights import find_places

_PREFERRED = (
    "num_key_value_heads", "num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim",
    "num_heads", "n_head", "d_kv", "hidden_size",
)  # fmt: skip
"""Names that files have had longest come first: a config may lack what a newer class fills in."""


Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class _Pair:
    """One block in both networks, the shapes of their tensors, and the numbers known so far by name."""

    first: Block
    second: Block
    shapes: tuple[Shapes, Shapes]
    settings: tuple[dict[str, float], dict[str, float]]
    scope: tuple[dict[str, float], dict[str, float]]
    used: set[str]

    def named(self, tensor: str) -> str:
        """A tensor's name with ``{}`` in place of the numbers that the block's own name has; others are no layers'."""
        count = without_numbers(self.first.name).count("{}")
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", tensor, count=count) if count else tensor

    def lengths(self, here: Heads, there: Heads) -> tuple[int, int]:
        """How long the axis is that heads lie on, in either network."""
        return self.shapes[0][here.weight][here.axis], self.shapes[1][there.weight][there.axis]

    def know(self, name: str, values: tuple[float, float]) -> None:
        for scope, value in zip(self.scope, values, strict=True):
            scope[name] = value

    def fit(self, values: tuple[int, int], *guesses: str) -> str | int:
        """The simplest formula that gives both numbers, of ``guesses`` first.

        Raises Unexplained when none does.
        """
        for formula in itertools.chain(guesses, self._local(values), self._from_config(values)):
            if all(evaluate(formula, scope) == value for scope, value in zip(self._scopes(), values, strict=True)):
                self.used |= {word for word in str(formula).split() if word in self.settings[0]}
                return formula
        if values[0] == values[1]:
            return values[0]
        raise Unexplained(f"no formula in the config gives {values[0]} and {values[1]}")

    def _of_own_part(self, names: Sequence[str]) -> list[str]:
        """Settings without those of other parts, where the part has a config of its own: its settings come first.

        Where encoder and decoder have configs, that with the name of a module around the block does.
        """
        block = self.first
        weight = block.down.weight if isinstance(block, FeedForward) else block.output.weight
        own, modules = part_of(weight), weight.split(".")
        nested = {name: part_of(name.rpartition(".")[0]) for name in names if "." in name}
        if own not in nested.values():
            return sorted(names, key=lambda name: name in nested and name.split(".")[0] not in modules)
        kept = {own, "language"} if own in {"encoder", "decoder"} else {own}  # either may have a text_config inside
        names = [name for name in names if nested.get(name, own) in kept]
        return sorted(names, key=lambda name: (name not in nested, name.split(".")[0] not in modules))

    def head_sizes(self) -> list[str]:
        """Settings that say how large one head is."""
        return [name for name in self.settings[0] if _last(name) in SIZES_OF_ONE_HEAD]

    def head_counts(self) -> list[str]:
        """Settings that count heads for every layer: one with a single head is counted by them, too."""
        names = (name for name in self.settings[0] if name.endswith("[layer]"))
        return self._of_own_part([name for name in names if _last(name) in COUNTS_OF_HEADS])

    def fit_one(self, which: int, value: int) -> str:
        """The simplest formula that gives a number in one of the networks, where the other tells nothing.

        Raises Unexplained when none does.
        """
        for formula in _terms(self.scope[which]):
            if evaluate(formula, self.scope[which]) == value:
                return formula
        raise Unexplained(f"no formula in the config gives {value}")

    def _scopes(self) -> list[dict[str, float]]:
        return [{**settings, **scope} for settings, scope in zip(self.settings, self.scope, strict=True)]

    def _local(self, values: tuple[int, int]) -> Iterator[str | int]:
        """Zero or one, then products of what is known, their multiples, differences and sums."""
        if values in {(0, 0), (1, 1)}:
            yield values[0]
        terms = _terms(self.scope[0])
        yield from terms
        yield from (f"{count} * {term}" for count in (2, 3) for term in terms)
        yield from (f"{a} - {b}" for a, b in itertools.permutations(_sizes(self.scope[0]), 2))
        for count in (2, 3):
            for chosen in itertools.combinations_with_replacement(terms, count):
                if sum(evaluate(term, self.scope[0]) for term in chosen) == values[0]:
                    yield " + ".join(chosen)

    def _from_config(self, values: tuple[int, int]) -> Iterator[str | int]:
        """A share of what is known, a setting that counts heads or their size, a quotient of two.

        Settings that are the same in both networks would fit by chance, but for those that may be.
        """
        first, second = self.settings
        names = sorted(first, key=lambda name: (_rank(name), name.count("."), len(name), name))
        names = self._of_own_part(names)
        shares = [name for name in names if "rotary" in name and isinstance(first[name], float)]
        sizes = [name for name in names if _last(name) in SIZES_OF_HEADS or first[name] != second.get(name)]
        whole = [*_sizes(self.scope[0]), *self.head_sizes()]
        yield from (f"{size} * {share}" for size in whole for share in shares)
        yield from (name for name in sizes if first[name] == values[0])
        yield from (f"{name} + {size}" for name in sizes if "head_dim" in name for size in _sizes(self.scope[0]))
        counts = [name for name in sizes if _last(name) in COUNTS_OF_HEADS and first[name]]
        yield from (f"{a} / {b}" for a in sizes for b in counts if first[a] / first[b] == values[0])


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1].removesuffix("[layer]")


def _rank(name: str) -> int:
    return _PREFERRED.index(_last(name)) if _last(name) in _PREFERRED else len(_PREFERRED)


def _sizes(scope: Mapping[str, float]) -> list[str]:
    return [name for name in scope if name not in {"groups", "members"}]


def _terms(scope: Mapping[str, float]) -> list[str]:
    """Products of known numbers that places are usually made of."""
    outer = ("", "groups * ", "members * ", "groups * members * ") if "groups" in scope else ("",)
    return [factor + size for factor in outer for size in _sizes(scope)]


_NOT_AT_BOTH = "proven at one size of the network and not at another"


def tabulate(
    model_type: str, network_class: str, one: tuple[Specimen, Derivation], two: tuple[Specimen, Derivation]
) -> DerivedMap:
    """The map of a type from two derivations with different sizes; blocks that no formula describes are left out.

    Where no setting counts the heads, or layers have different numbers of them, the lengths of tensors tell.
    """
    table = _tabulated(model_type, network_class, one, two, by_length=frozenset())
    every = {without_numbers(block.name) for block in one[1].blocks if isinstance(block, Attention)}
    if not (lacking := every - {str(template["name"]) for template in table.attentions}):
        return table
    again = _tabulated(model_type, network_class, one, two, by_length=frozenset(lacking))
    return again if len(again.attentions) > len(table.attentions) else table


def _tabulated(
    model_type: str,
    network_class: str,
    one: tuple[Specimen, Derivation],
    two: tuple[Specimen, Derivation],
    *,
    by_length: frozenset[str],
) -> DerivedMap:
    (first, found), (second, other) = one, two
    settings = (numbers(first.config), numbers(second.config))
    shapes = (_shapes(first), _shapes(second))
    attentions: dict[str, dict[str, Any]] = {}
    feed_forwards: dict[str, dict[str, Any]] = {}
    reasons = {
        without_numbers(name): text for name, text in found.reasons.items() if "not proven" in text or " " in name
    }
    used: set[str] = set()
    singles: dict[str, bool] = {}
    dropped: set[str] = set()
    for block in found.blocks:
        if block.name not in {twin.name for twin in other.blocks}:
            reasons[without_numbers(block.name)] = _NOT_AT_BOTH
    for block, twin in _matched(found.blocks, other.blocks):
        layer = tuple(int(word) for word in block.name.split(".") if word.isdigit())
        here, there = (
            {**own, **of_layer(one.config, layer)} for own, one in zip(settings, (first, second), strict=True)
        )
        both = _Pair(block, twin, shapes, (here, there), ({}, {}), used)
        name = without_numbers(block.name)
        try:
            if isinstance(block, Attention) and isinstance(twin, Attention):
                template = _attention(both, block, twin, reasons, by_length=name in by_length)
                kept = attentions
            else:
                assert isinstance(block, FeedForward)
                assert isinstance(twin, FeedForward)
                template = _feed_forward(both, block, twin)
                kept = feed_forwards
        except Unexplained as reason:
            reasons[name] = str(reason)
            continue
        is_single = all(isinstance(one, Attention) and one.groups == 1 for one in (block, twin))
        if isinstance(block, FeedForward) and block.down.slice is not None:
            template |= _mixture(both, block, found, other)
        known = kept.setdefault(name, template)
        if known == template:
            singles[name] = is_single
            continue
        if name in by_length:
            known, template = _with_strides(known, template)[0], _with_strides(template, known)[0]
        elif singles[name] != is_single:
            known, template = _with_strides(known, template) if singles[name] else _with_strides(template, known)
        singles[name] = False
        try:
            kept[name] = known if known == template else _common(known, template)
            if known.get("parts") and template.get("parts") and not kept[name]["parts"]:
                reasons[f"queries and keys of {name}"] = "layers of one form differ in their positions or their norm"
        except Unexplained as reason:
            reasons[name] = str(reason)
            dropped.add(name)
    for name in {*attentions, *feed_forwards} - dropped:  # of experts, an input may reach others at another size
        if reasons.get(name) == _NOT_AT_BOTH and name.count("{}") > 1:
            del reasons[name]
    defaults = {name: value for name in sorted(used) if isinstance(value := settings[0].get(name), float)}
    prefix = str(getattr(first.network, "base_model_prefix", "") or "")
    return DerivedMap(
        model_type=model_type,
        network_class=network_class,
        prefix=f"{prefix}." if prefix else "",
        attentions=tuple(template for name, template in attentions.items() if name not in dropped),
        feed_forwards=tuple(template for name, template in feed_forwards.items() if name not in dropped),
        flags=flags_of(first.config) | _kinds_of_towers(first),
        defaults=defaults,
        known=tuple(sorted({without_numbers(name) for name in first.stored_names()})),
        reasons=dict(sorted(reasons.items())),
        proof=_proof(str(type(first.network).__module__).partition(".")[0], found, other),
    )


def _kinds_of_towers(specimen: Specimen) -> dict[str, str]:
    """The ``model_type`` of every tower that may be of several, as a flag."""
    parts = getattr(specimen.network.config, "sub_configs", {})
    free = [name for name, kind in parts.items() if is_of_a_tower(name) and kind.__name__ == "AutoConfig"]
    return {f"{name}.model_type": specimen.config[name]["model_type"] for name in free if specimen.config.get(name)}


def _shapes(specimen: Specimen) -> Shapes:
    return {name: tuple(place.shape) for name, place in find_places(specimen.network).items()}


def _matched(first: Sequence[Block], second: Sequence[Block]) -> Iterator[tuple[Block, Block]]:
    """Blocks of the same name in both networks."""
    twins = {block.name: block for block in second}
    for block in first:
        twin = twins.get(block.name)
        if twin is not None and type(twin) is type(block):
            yield block, twin


def _with_strides(single: dict[str, Any], other: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The template of a layer with one head, with the distances between heads of another layer, and the other."""

    def heads(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
        found = {**{name: there[name] for name in ("group_stride", "member_stride") if name in there}, **here}
        if "offset" in here and str(there.get("offset")).replace("groups * ", "") == here["offset"]:
            found["offset"] = there["offset"]  # the same with one group
        return found

    parts = [
        {**here, **{side: heads(here[side], there[side]) for side in ("query", "key")}}
        for here, there in zip(single["parts"], other["parts"], strict=False)
    ]
    sides = {side: heads(single[side], other[side]) for side in ("value", "output")}
    return {**single, **sides, "parts": parts if len(parts) == len(single["parts"]) else single["parts"]}, other


_PROPERTIES = {
    "parts": (),
    "norm": None,
    "position": "none",
    "is_cross": False,
    "heads_limit": "",
    "value_group": "general_linear",
}


def _common(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for both of two templates with the same tensors: layers may differ in what no tensor shows.

    Some rotate queries and keys and others do not (rotary pairs hold for both), or heads stay in order in some. Some
    make fewer keys than queries of one stream and others as many: that is no attention to another stream.
    """
    if any(first.get(name) != second.get(name) for name in {*first, *second} - {*_PROPERTIES, "joined"}):
        raise Unexplained("layers of one form differ in where their heads lie")
    one, other = sorted((first, second), key=lambda template: any(part["rotary"] for part in template.get("parts", ())))
    groups = {one["value_group"], other["value_group"]} - {"general_linear"}
    if len(groups) > 1:
        raise Unexplained("layers of one form differ in what they do to values")
    common = {**other, "heads_limit": other["heads_limit"] or one["heads_limit"]}
    common["is_cross"] = one["is_cross"] and other["is_cross"]
    if "joined" in first or "joined" in second:
        common["joined"] = _common_streams(first.get("joined", ()), second.get("joined", ()))
    common["value_group"] = groups.pop() if groups else "general_linear"
    is_scored = bool(one["parts"] and other["parts"])
    if not is_scored or not _spans(one["parts"], other["parts"]) or one.get("norm") != other.get("norm"):
        common |= {"parts": [], "position": "none", "heads_limit": common["heads_limit"] or NOT_UNDERSTOOD}
        common.pop("norm", None)
        if "joined" in common:
            common["joined"] = [_unscored_stream(stream) for stream in common["joined"]]
    return common


def _common_streams(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Streams of both of two templates: in some layers nothing may read what a stream gathers."""
    if len(first) != len(second):
        raise Unexplained("layers of one form differ in their streams")
    found = []
    for one, other in zip(first, second, strict=True):
        if any(one.get(name) != other.get(name) for name in {*one, *other} - {"output"}):
            raise Unexplained("layers of one form differ in where the heads of their streams lie")
        outputs = [{**stream["output"], "optional": True} for stream in (one, other) if "output" in stream]
        if outputs and outputs[0] != outputs[-1]:
            raise Unexplained("layers of one form differ in where the heads of their streams lie")
        is_same = one.get("output") == other.get("output")
        found.append(dict(one) if is_same else {**one, "output": outputs[0]})
    return found


def _unscored_stream(stream: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**stream, "queries": [], "keys": []}.items() if name != "norm"}


def _spans(plain: Sequence[Mapping[str, Any]], rotary: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what the rotary parts allow is allowed by the others too."""
    if plain == rotary:
        return True
    is_free = len(plain) == 1 and not plain[0]["rotary"]
    first = rotary[0]
    return is_free and all(
        first[side].get(key) == plain[0][side].get(key)
        for side in ("query", "key")
        for key in ("weight", "axis", "offset")
    )


def _attention(
    both: _Pair, block: Attention, twin: Attention, reasons: dict[str, str], *, by_length: bool
) -> dict[str, Any]:
    """The template of one attention; why it has no queries and keys, if so, goes to ``reasons``."""
    same = ("position", "is_cross", "heads_limit", "value_group")
    if block.is_cross != twin.is_cross or block.value_group != twin.value_group:
        raise Unexplained("two sizes of the network have different groups")
    template: dict[str, Any] = {"name": without_numbers(block.name)}
    if by_length:
        template |= _counts_by_length(both, block, twin)
    else:
        template["groups"] = both.fit((block.groups, twin.groups), *both.head_counts())
        both.know("groups", (block.groups, twin.groups))
        template["members"] = _members(both, block, twin, (block.num_heads, twin.num_heads))
        both.know("members", (block.members, twin.members))
        template["value_size"] = _value_size(both, block, twin)
        both.know("value_size", (block.value_size, twin.value_size))
    changed: dict[str, Any] = {}
    known = tuple(dict(scope) for scope in both.scope)
    try:
        template["parts"] = _score_parts(both, block, twin)
    except Unexplained as reason:  # the values need no queries and keys
        reasons[f"queries and keys of {template['name']}"] = str(reason)
        both.scope = (known[0], known[1])
        template["parts"] = []
        changed = {"position": "none", "heads_limit": block.heads_limit or NOT_UNDERSTOOD}
    template["value"] = _heads(both, block.value, twin.value)
    template["output"] = _heads(both, block.output, twin.output)
    if block.norm is not None and template["parts"]:
        template["norm"] = _norm(both, block.norm)
    if block.joined:
        if len(block.joined) != len(twin.joined):
            raise Unexplained("two sizes of the network have different streams")
        template["joined"] = [
            _joined(both, here, there, is_scored=bool(template["parts"]))
            for here, there in zip(block.joined, twin.joined, strict=True)
        ]
    return template | {name: getattr(block, name) for name in same} | changed


def _counts_by_length(both: _Pair, block: Attention, twin: Attention) -> dict[str, Any]:
    """How many heads there are, from the lengths of the tensors of values and of what reads the result."""
    pairs = tuple((one.groups * one.value_size, one.num_heads * one.value_size) for one in (block, twin))
    lengths = tuple(zip(both.lengths(block.value, twin.value), both.lengths(block.output, twin.output), strict=True))
    if pairs != lengths:
        raise Unexplained("the values, or what reads the result, hold more than the heads that no setting counts")
    size = both.fit((block.value_size, twin.value_size))
    for name in ("value_size", "groups", "members"):
        both.know(name, (getattr(block, name), getattr(twin, name)))
    return {"value_size": size, "groups": "rows / value_size", "members": "columns / value_size / groups"}


def _score_parts(both: _Pair, block: Attention, twin: Attention) -> list[dict[str, Any]]:
    if (len(block.parts), block.position, block.heads_limit) != (len(twin.parts), twin.position, twin.heads_limit):
        raise Unexplained("two sizes of the network have different groups")
    parts = []
    for index, (part, other) in enumerate(zip(block.parts, twin.parts, strict=True)):
        before = "".join(f" - part_{earlier}" for earlier in range(index))
        is_rest = 0 < index == len(block.parts) - 1
        rest = [f"{size}{before}" for size in ("value_size", *both.head_sizes())] if is_rest else []
        parts.append({"size": both.fit((part.size, other.size), *rest)})
        both.know(f"part_{index}", (part.size, other.size))
    if block.parts:
        both.know("query_size", (sum(p.size for p in block.parts), sum(p.size for p in twin.parts)))
    return [
        {
            **data,
            "query": _heads(both, part.query, other.query),
            "key": _heads(both, part.key, other.key),
            "rotary": part.rotary,
            "shared_key": part.shared_key,
        }
        for data, part, other in zip(parts, block.parts, twin.parts, strict=True)
    ]


def _value_size(both: _Pair, block: Attention, twin: Attention) -> str | int:
    """From the columns that read the values, where nothing else is read by the same weight."""
    whole = (block.num_heads * block.value_size, twin.num_heads * twin.value_size)
    if both.lengths(block.output, twin.output) == whole:
        return "columns / groups / members"
    return both.fit((block.value_size, twin.value_size))


def _members(both: _Pair, block: Attention, twin: Attention, heads: tuple[int, int]) -> str | int:
    if block.members == twin.members == 1:
        return 1
    formula = both.fit(heads)
    if isinstance(formula, int):
        raise Unexplained("no setting counts the query heads; layers may have different numbers of them")
    return f"{formula} / groups"


def _joined(both: _Pair, here: JoinedStream, there: JoinedStream, *, is_scored: bool) -> dict[str, Any]:
    """The template of another stream of an attention, without queries and keys where those are left alone."""
    if (here.output is None) != (there.output is None):
        raise Unexplained("two sizes of the network have different streams")
    data: dict[str, Any] = {"queries": [], "keys": [], "value": _heads(both, here.value, there.value)}
    if is_scored:
        for side in ("queries", "keys"):
            pairs = zip(getattr(here, side), getattr(there, side), strict=True)
            data[side] = [_heads(both, own, other) for own, other in pairs]
    if here.output is not None and there.output is not None:
        data["output"] = _heads(both, here.output, there.output)
    return data | ({"norm": _norm(both, here.norm)} if here.norm is not None and is_scored else {})


def _norm(both: _Pair, norm: QueryKeyNorm) -> dict[str, Any]:
    names = {side: [both.named(name) for name in getattr(norm, side)] for side in ("query_gains", "key_gains")}
    biases = {side: name and both.named(name) for side in ("query_bias", "key_bias") for name in (getattr(norm, side),)}
    return names | biases | {key: getattr(norm, key) for key in ("kind", "scope", "epsilon", "gain_axis", "offset")}


def _feed_forward(both: _Pair, block: FeedForward, twin: FeedForward) -> dict[str, Any]:
    if (block.activation, block.scale_limit) != (twin.activation, twin.scale_limit):
        raise Unexplained("two sizes of the network have different groups")
    both.know("units", (block.size, twin.size))
    template: dict[str, Any] = {"name": without_numbers(block.name)}
    columns = both.lengths(block.down, twin.down)
    if columns != (block.size, twin.size):  # the same weight reads an attention, too
        if both.lengths(block.up, twin.up) != (block.size, twin.size):
            raise Unexplained("no tensor is as long as there are hidden units")
        template["size"] = "rows"
        both.know("columns", columns)
    for side in ("gate", "up", "down"):
        here, there = getattr(block, side), getattr(twin, side)
        if here is not None and there is not None:
            template[side] = _heads(both, here, there)
    if len(block.along) != len(twin.along):
        raise Unexplained("two sizes of the network have different tensors along the hidden units")
    if block.along:
        template["along"] = [_heads(both, here, there) for here, there in zip(block.along, twin.along, strict=True)]
    return template | {"activation": block.activation, "scale_limit": block.scale_limit}


def _mixture(both: _Pair, block: FeedForward, found: Derivation, other: Derivation) -> dict[str, Any]:
    """The template of the mixture that a block is an expert of; nothing where its experts keep their order."""
    for mixture in found.mixtures:
        if block.name in mixture.experts and mixture.name in {twin.name for twin in other.mixtures}:
            data: dict[str, Any] = {"name": without_numbers(mixture.name), "router": both.named(mixture.router)}
            data["router_bias"] = mixture.router_bias and both.named(mixture.router_bias)
            return {"mixture": {**data, "others": [both.named(name) for name in mixture.others]}}
    return {}


def _heads(both: _Pair, here: Heads, there: Heads) -> dict[str, Any]:
    if (without_numbers(here.weight), here.axis) != (without_numbers(there.weight), there.axis):
        raise Unexplained("two sizes of the network are stored differently")
    if (here.element_stride, here.slice is None) != (there.element_stride, there.slice is None):
        raise Unexplained("two sizes of the network are stored differently")
    data: dict[str, Any] = {"weight": both.named(here.weight), "axis": here.axis}
    if here.element_stride != 1:
        data["element_stride"] = here.element_stride
    if here.slice is not None:
        data["sliced"] = True
    if here.bias is not None:
        data["bias"] = both.named(here.bias)
    counts = {"group_stride": "groups", "member_stride": "members"}
    for key in ("offset", *counts):
        values = (getattr(here, key), getattr(there, key))
        single = [scope.get(counts.get(key, "")) == 1 for scope in both.scope]
        if single[0] != single[1] and 0 in values and any(values):
            which = single.index(False)  # the other network has but one head, and so no distance between heads
            data[key] = both.fit_one(which, values[which])
        elif values != (0, 0):
            # Heads that share a group lie side by side, however many groups there are by chance.
            is_shared = key == "group_stride" and here.member_stride and there.member_stride
            side_by_side = [f"members * {size}" for size in _sizes(both.scope[0])] if is_shared else []
            data[key] = both.fit(values, *side_by_side)
    return data


def _proof(library: str, *derivations: Derivation) -> dict[str, Any]:
    """The versions a map was proven with, and the worst figures for every kind of group."""
    figures: dict[str, dict[str, Any]] = {}
    for derivation in derivations:
        spaces = symmetry_map(derivation.blocks, mixtures=derivation.mixtures).spaces
        for name, proof in derivation.proofs.items():
            if name not in spaces:
                continue
            kind = f"{spaces[name].role} {spaces[name].group}"
            worst = figures.setdefault(kind, {"change": 0.0, "one_sided": float("inf"), "outside": None})
            worst["change"] = max(worst["change"], proof.change)
            worst["one_sided"] = min(worst["one_sided"], proof.one_sided)
            if proof.outside is not None:
                worst["outside"] = min(worst["outside"] or float("inf"), proof.outside)
    rounded = {
        kind: {key: value and float(f"{value:.2g}") for key, value in row.items()} for kind, row in figures.items()
    }
    joint = max(derivation.joint for derivation in derivations)
    return {library: version(library), "torch": version("torch"), "joint": joint, "groups": rounded}
