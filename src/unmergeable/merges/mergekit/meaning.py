"""What a mergekit configuration means: which model plays which part, and what holds for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from unmergeable.errors import BadInput
from unmergeable.merges.base import Merge
from unmergeable.merges.mergekit.config import USE_MERGEKIT, MergeConfig, Parameters, Slice, Source
from unmergeable.merges.mergekit.methods import METHODS, MergekitMethod
from unmergeable.merges.stacks import depths_of, layer_of, lies_before
from unmergeable.merges.variation import Vary
from unmergeable.merges.vocabularies import Tokenizer, TokenSource


@dataclass(frozen=True)
class Part:
    """Layers ``first`` to ``stop`` of a model, named as in the file; ``stop`` None means all."""

    model: str
    first: int
    stop: int | None


@dataclass(frozen=True)
class Meaning:
    """What a configuration means: which model plays which part, and with what.

    ``base`` and ``experts`` name models as the file does; the base is also the donor of configuration and tokenizer.
    Where the file has slices, ``stacks`` says of each of these names which layers it stands for, and ``donor`` is whose
    configuration and tokenizer the merge has, None for those of the first.
    """

    method: Merge
    base: str | None
    experts: tuple[str, ...]
    vary: Callable[[Iterable[str]], Vary]
    tokenizer: Tokenizer | None = None
    stacks: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    donor: str | None = None


def meaning_of(config: MergeConfig) -> Meaning:
    """The merge a configuration describes, in mergekit's variant of the method.

    ``vary`` is given the names of all tensors, since gradients depend on the number of layers.

    Raises:
        BadInput: for a parameter that is missing or cannot be used, or too many models.
    """
    known = METHODS[config.merge_method]
    roles = [_roles(config, known, part) for part in config.slices]
    counts = [len(role.experts) for role in roles]
    if len(set(counts)) > 1 and not known.fills_up:
        raise BadInput(
            f"slices: {config.merge_method} merges as many models in each, but they list "
            f"{' and '.join(map(str, sorted(set(counts))))} beside the base; list as many in each."
        )
    # Of the two models of a way, each has its own end of it; of others the order means nothing.
    listed = [role.experts for role in roles]
    experts = tuple(zip(*listed, strict=True)) if known.base == "first" else _aligned(listed)
    switches = {name: _switch(config, name, default) for name, default in known.switches.items()}

    def vary(names: Iterable[str]) -> Vary:
        places = _places(config, tuple(names))
        return lambda name: known.terms(
            _Lookup(config, tuple(expert[places[name][0]] for expert in experts), name, *places[name]), switches
        )

    bases = [role.base for role in roles]
    stacks: dict[str, tuple[Part, ...]] = {}
    names = tuple(_name(config, expert, stacks) for expert in experts)
    base = None
    if None not in bases:
        base = _name(config, [source for source in bases if source is not None], stacks)
    donor = config.base_model if stacks else None
    if known.base == "expert" and stacks:
        base = None
    method = known.method(switches, base is not None)
    return Meaning(method, base, names, vary, _tokenizer(config, base, names, stacks), stacks, donor)


@dataclass(frozen=True)
class _Roles:
    """The models of a slice: the base, where the method asks for one, and the others."""

    base: Source | None
    experts: tuple[Source, ...]


def _roles(config: MergeConfig, known: MergekitMethod, part: Slice) -> _Roles:
    name = part.base_model or config.base_model
    listed = next((source for source in part.sources if source.model == name), None)
    others = tuple(source for source in part.sources if source is not listed)
    base = listed or (None if name is None else Source(name, {}, _common_start(part, name, known)))
    if known.base == "expert":
        # A base that is named takes part like any other model, as in mergekit; in slices it has to be listed.
        added = () if base is None or listed is not None or part.stop is not None else (base,)
        roles = _Roles(base, (*part.sources, *added))
        if known.most is not None and len(roles.experts) > known.most:
            raise BadInput(f"{config.merge_method} takes one model at a time: {len(roles.experts)} are listed.")
        return roles
    if known.base == "first":
        if base is None or len(others) != 1:
            raise BadInput(f"{config.merge_method} goes from base_model to one other model: name the two.")
        return _Roles(None, (base, others[0]))
    if base is None and known.base == "origin":
        raise BadInput(f"base_model is missing: {config.merge_method} merges task vectors.")
    if known.most is not None and len(others) != known.most:
        raise BadInput(f"{config.merge_method} takes {known.most} beside the base: {len(others)} are listed.")
    return _Roles(base, others)


def _common_start(part: Slice, name: str, known: MergekitMethod) -> int:
    """Where the layers of a base begin that a slice does not list: where those of all others do."""
    starts = {source.first for source in part.sources}
    if len(starts) > 1 and known.base != "expert":
        raise BadInput(f"slices: {name}, the base_model, is to be a source of each slice, with its layer_range.")
    return next(iter(starts), 0)


def _aligned(slices: Sequence[tuple[Source, ...]]) -> tuple[tuple[Source | None, ...], ...]:
    """For each expert its source in every slice: the same model throughout where possible; None where there is none."""
    size = max(map(len, slices))
    order = [source.model for source in slices[0]]
    columns: list[list[Source | None]] = []
    for sources in slices:
        column: list[Source | None] = [None] * size
        left = list(sources)
        for place, model in enumerate(order):
            found = next((source for source in left if source.model == model), None)
            if found is not None:
                column[place] = found
                left.remove(found)
        for source in left:
            column[column.index(None)] = source
        columns.append(column)
    return tuple(zip(*columns, strict=True))


def _name(config: MergeConfig, sources: Sequence[Source | None], stacks: dict[str, tuple[Part, ...]]) -> str:
    """What a model of the merge is called; where it is of several models' layers, by all of them."""
    if config.slices[0].stop is None:
        assert sources[0] is not None, "there is one slice"
        return sources[0].model
    parts = []
    for source, part in zip(sources, config.slices, strict=True):
        # Without weight any model will do, and one of the slice itself is sure to have these layers.
        stands = source or part.sources[0]
        assert part.stop is not None, "slices have an end"
        parts.append(Part(stands.model, stands.first, stands.first + part.stop - part.first))
    in_place = all(part.first == own.first for part, own in zip(config.slices, parts, strict=True))
    if in_place and len({part.model for part in parts}) == 1:
        name = parts[0].model
    else:
        name = " + ".join(f"{part.model}[{part.first}:{part.stop}]" for part in parts)
    stacks[name] = tuple(parts)
    return name


def _tokenizer(
    config: MergeConfig, base: str | None, experts: Sequence[str], stacks: Mapping[str, Sequence[Part]]
) -> Tokenizer | None:
    """The choice of tokens, with models by their part in the merge."""
    named = config.tokenizer
    if named is None:
        return None
    roles: dict[str, str | int] = {}
    for number, expert in reversed(list(enumerate(experts, start=1))):
        roles |= dict.fromkeys([part.model for part in stacks.get(expert, ())] or [expert], number)
    if base is not None:
        roles |= dict.fromkeys([part.model for part in stacks.get(base, ())] or [base], "base")

    def part(model: str) -> str | int:
        if model not in roles:
            raise BadInput(f"tokenizer: {model} is none of the models; name one that is merged, base or union.")
        return roles[model]

    is_kind = named.source in ("base", "union")
    tokens = {
        token: TokenSource(None if entry.model is None else part(entry.model), entry.token, entry.row, entry.force)
        for token, entry in named.tokens.items()
    }
    return Tokenizer(named.source if is_kind else part(named.source), tokens)


@dataclass(frozen=True)
class _Lookup:
    """The parameters as they hold for one tensor; ``experts`` are the sources in its slice, None without one."""

    config: MergeConfig
    experts: tuple[Source | None, ...]
    name: str
    slice: int
    t: float

    @property
    def _shared(self) -> tuple[Parameters, ...]:
        part = self.config.slices[self.slice]
        return part.parameters, part.module, self.config.parameters

    def of_tensor(self, parameter: str, default: float | None = None) -> float:
        return self._first(self._shared, parameter, default, of="")

    def per_expert(self, parameter: str, default: float | None = None) -> tuple[float, ...]:
        return tuple(
            self._first((expert.parameters, *self._shared), parameter, default, of=f" of {expert.model}")
            if expert is not None
            else 0.0
            for expert in self.experts
        )

    def _first(self, scopes: Sequence[Parameters], parameter: str, default: float | None, *, of: str) -> float:
        for scope in scopes:
            for entry in scope.get(parameter, ()):
                if entry.matches(self.name):
                    return entry.at(self.t)
        if default is None:
            raise BadInput(f"{self.config.merge_method} needs {parameter}{of} for tensor {self.name}: set it.")
        return default


def _switch(config: MergeConfig, name: str, default: bool) -> bool:
    for part in config.slices:
        for parameters in (part.parameters, *(source.parameters for source in part.sources)):
            if name in parameters:
                raise BadInput(f"{name} holds for the whole merge: put it in the parameters at the top.")
    everywhere = config.slices[0].module.get(name) or config.parameters.get(name)
    return default if everywhere is None else bool(everywhere[0].gradient[0])


def _places(config: MergeConfig, names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """For each tensor the number of the slice it belongs to, and where in it, from 0 to 1."""
    depths = depths_of(names)
    slices = config.slices
    last = slices[-1]
    if last.stop is not None and set(depths.values()) != {last.stop}:
        raise BadInput(
            f"the slices cover layers 0 to {last.stop}, but the models have {_depths(depths)}: only whole models "
            f"can be merged; or {USE_MERGEKIT}."
        )

    def place(name: str) -> tuple[int, float]:
        found = layer_of(name)
        if found is None:
            return (0 if lies_before(name) else len(slices) - 1), 0.0
        stack, index = found
        number, owner = next((n, part) for n, part in enumerate(slices) if part.stop is None or index < part.stop)
        count = (depths[stack] if owner.stop is None else owner.stop) - owner.first
        return number, (index - owner.first) / (count - 1) if count > 1 else 1.0

    return {name: place(name) for name in names}


def _depths(depths: Mapping[str, int]) -> str:
    return ", ".join(f"{depth} under {stack}" for stack, depth in depths.items()) or "none that can be counted"
