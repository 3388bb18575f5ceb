"""What a mergekit configuration means: which model plays which part, and what holds for each tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from unmergeable.errors import BadInput
from unmergeable.merges.base import Merge
from unmergeable.merges.mergekit.config import USE_MERGEKIT, MergeConfig, Parameters, Slice
from unmergeable.merges.mergekit.methods import METHODS
from unmergeable.merges.variation import Vary

# Where the layers of a model are counted: the number behind one of these.
_STACKS = r"(?:layers?|h|blocks?|resblocks|transformer_blocks)"
_LAYER = re.compile(rf"(?P<stack>(?:.*?\.)??{_STACKS})\.(?P<index>\d+)\.")
_BEFORE_THE_LAYERS = re.compile(r"emb|wte|wpe|shared|patch|cls_token")


@dataclass(frozen=True)
class Meaning:
    """What a configuration means: which model plays which part, and with what.

    ``base`` and ``experts`` name models as the file does; the base is also the donor of configuration and tokenizer.
    """

    method: Merge
    base: str | None
    experts: tuple[str, ...]
    vary: Callable[[Iterable[str]], Vary]


def meaning_of(config: MergeConfig) -> Meaning:
    """The merge a configuration describes, in mergekit's variant of the method.

    ``vary`` is given the names of all tensors, since gradients depend on the number of layers.

    Raises:
        BadInput: for a parameter that is missing or cannot be used, or too many models.
    """
    known = METHODS[config.merge_method]
    base = config.base_model
    others = tuple(model for model in config.models if model != base)
    if known.base == "expert":
        # A base that is named takes part like any other model, as in mergekit.
        experts = config.models if base is None or base in config.models else (*config.models, base)
    elif known.base == "first":
        if base is None or len(others) != 1:
            raise BadInput(f"{config.merge_method} goes from base_model to one other model: name the two.")
        experts, base = (base, others[0]), None
    else:
        experts = others
        if base is None and known.base == "origin":
            raise BadInput(f"base_model is missing: {config.merge_method} merges task vectors.")
        if known.most is not None and len(experts) != known.most:
            raise BadInput(f"{config.merge_method} takes {known.most} beside the base: {len(experts)} are listed.")
    switches = {name: _switch(config, name, default) for name, default in known.switches.items()}

    def vary(names: Iterable[str]) -> Vary:
        places = _places(config, tuple(names))
        return lambda name: known.terms(_Lookup(config, experts, name, *places[name]), switches)

    return Meaning(known.method(switches, base is not None), base, experts, vary)


@dataclass(frozen=True)
class _Lookup:
    """The parameters as they hold for one tensor."""

    config: MergeConfig
    experts: tuple[str, ...]
    name: str
    slice: Slice
    t: float

    def of_tensor(self, parameter: str, default: float | None = None) -> float:
        return self._first((self.slice.parameters, self.config.parameters), parameter, default, of="")

    def per_expert(self, parameter: str, default: float | None = None) -> tuple[float, ...]:
        return tuple(
            self._first((own, self.slice.parameters, self.config.parameters), parameter, default, of=f" of {expert}")
            for expert in self.experts
            for own in [self._own(expert)]
        )

    def _own(self, expert: str) -> Parameters:
        # The base takes part in `linear` without being listed.
        return next((source.parameters for source in self.slice.sources if source.model == expert), {})

    def _first(self, scopes: Sequence[Parameters], parameter: str, default: float | None, *, of: str) -> float:
        for scope in scopes:
            for entry in scope.get(parameter, ()):
                if entry.matches(self.name):
                    return entry.at(self.t)
        if default is None:
            raise BadInput(f"{self.config.merge_method} needs {parameter}{of} for tensor {self.name}: set it.")
        return default


def _switch(config: MergeConfig, name: str, default: bool) -> bool:
    everywhere = config.parameters.get(name)
    for part in config.slices:
        for parameters in (part.parameters, *(source.parameters for source in part.sources)):
            if name in parameters:
                raise BadInput(f"{name} holds for the whole merge: put it in the parameters at the top.")
    return default if everywhere is None else bool(everywhere[0].gradient[0])


def _places(config: MergeConfig, names: Sequence[str]) -> dict[str, tuple[Slice, float]]:
    """For each tensor the slice it belongs to, and where in it, from 0 to 1."""
    layers = {name: (match["stack"], int(match["index"])) for name in names if (match := _LAYER.match(name))}
    depths: dict[str, int] = {}
    for stack, index in layers.values():
        depths[stack] = max(depths.get(stack, 0), index + 1)
    first, last = config.slices[0], config.slices[-1]
    if last.stop is not None and set(depths.values()) != {last.stop}:
        raise BadInput(
            f"the slices cover layers 0 to {last.stop}, but the models have {_depths(depths)}: only whole models "
            f"can be merged; or {USE_MERGEKIT}."
        )

    def place(name: str) -> tuple[Slice, float]:
        if name not in layers:
            return (first if _BEFORE_THE_LAYERS.search(name) else last), 0.0
        stack, index = layers[name]
        owner = next(part for part in config.slices if part.stop is None or index < part.stop)
        count = (depths[stack] if owner.stop is None else owner.stop) - owner.first
        return owner, (index - owner.first) / (count - 1) if count > 1 else 1.0

    return {name: place(name) for name in names}


def _depths(depths: Mapping[str, int]) -> str:
    return ", ".join(f"{depth} under {stack}" for stack, depth in depths.items()) or "none that can be counted"
