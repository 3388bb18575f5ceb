"""A release that says the same in other words than its base: another ``model_type``, biases that add nothing.

    model type      one that transformers computes alike (Llama, Mistral, Qwen 2): the base's
    biases          where the base has none: those of values go into the output's, b_o + W_o b_v, because softmax
                    weights add up to one; those of keys that no rotary position turns are not seen; what is zero then
                    is left out

Neither moves a weight, and either keeps a release from being compared with its base. A bias that does add something
stays, and the release with it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from unmergeable.architecture import Architecture, detect
from unmergeable.architecture.blocks import FeedForward, output_bias
from unmergeable.checkpoint.correspondence import corresponding_names
from unmergeable.checkpoint.index import CheckpointIndex
from unmergeable.checkpoint.source import DerivedSource, TensorSource, shapes_of
from unmergeable.errors import BadInput, UnsupportedArchitecture
from unmergeable.gauge.additive import ValueFreedom, freedoms_of, of_values

ALIKE: tuple[frozenset[str], ...] = (frozenset({"llama", "mistral", "qwen2"}), frozenset({"roberta", "xlm-roberta"}))
"""Model types that compute the same from the same weights, but for windows and biases."""

SETTINGS = ("attention_bias", "mlp_bias")
"""What a config says of biases."""

NOTHING = 2.0**-6
"""Share of what was added up that may be left of a bias by rounding."""


@dataclass(frozen=True)
class Restated(DerivedSource):
    """``original`` without the tensors in ``dropped`` and with ``changes`` of its config; ``found``: what it was."""

    dropped: frozenset[str]
    changes: Mapping[str, Any]
    found: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return [name for name in self.original.names if name not in self.dropped]

    @cached_property
    def index(self) -> CheckpointIndex:
        """That of no files yet, where tensors are gone: headers, and the list of shards, of the original name them."""
        index = self.original.index
        if not self.dropped:
            return index
        shards = {
            name: replace(shard, path=None, tensors=tuple(one for one in shard.tensors if one not in self.dropped))
            for name, shard in index.shards.items()
        }
        entries = {name: entry for name, entry in index.entries.items() if name not in self.dropped}
        return replace(index, entries=entries, shards=shards, weights_index_file=None, weights_index=None)

    @property
    def config(self) -> Mapping[str, Any]:
        return {**self.original.config, **self.changes}


def restated(release: TensorSource, base: TensorSource) -> Restated | None:
    """``release`` in the words of ``base``; None where it says what the base says, or something else."""
    changes = _as_type(release.config, base.config)
    ours, theirs = release.config.get("model_type"), base.config.get("model_type")
    if ours != theirs and not changes:
        return None
    found = {"model_type": f"{ours}, as a {theirs}"} if changes else {}
    dropped = _idle_biases(release, base)
    if dropped:
        changes |= {key: base.config.get(key) for key in SETTINGS if release.config.get(key) != base.config.get(key)}
        found["idle_biases"] = f"{len(dropped)}, {min(dropped)} among them"
    return Restated(release, frozenset(dropped), changes, found) if found else None


def _as_type(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Changes that give a config the other's model type; none where it has it, or computes something else by it."""
    types = {str(config.get("model_type")) for config in (ours, theirs)}
    if len(types) == 1 or not any(types <= alike for alike in ALIKE) or _is_windowed(ours) != _is_windowed(theirs):
        return {}
    changes: dict[str, Any] = {"model_type": theirs["model_type"]}
    names = [str(next(iter(config.get("architectures") or ()), "")) for config in (ours, theirs)]
    if all("For" in name for name in names):
        changes["architectures"] = [names[1].partition("For")[0] + "For" + names[0].partition("For")[2]]
    return changes


def _is_windowed(config: Mapping[str, Any]) -> bool:
    """Whether attention does not see everything; Qwen 2 names a window that it uses only where told to."""
    default = 4096 if config.get("model_type") == "mistral" else None
    window = config.get("sliding_window", default) if config.get("use_sliding_window", True) else None
    return isinstance(window, int) and window < int(config.get("max_position_embeddings") or 0)


def _idle_biases(release: TensorSource, base: TensorSource) -> list[str]:
    """Biases of blocks that the base does not have and that add nothing together; none if one of them does."""
    shapes = shapes_of(release)
    more = set(shapes) - set(corresponding_names(shapes, shapes_of(base)))
    try:
        architecture = detect(release.config, shapes)
    except (UnsupportedArchitecture, BadInput):
        return []
    extra = sorted(more & _biases_of_blocks(architecture))
    if not extra or not all(shapes[name] for name in extra):
        return []
    freedoms = freedoms_of(architecture, release.names)
    unseen = {bias for bias, _ in freedoms.keys}
    by_output = {value.output_bias: value for value in freedoms.values}
    taken = {value.bias for value in by_output.values() if value.bias in extra and value.output_bias in extra}
    left = [name for name in extra if name not in unseen | taken]
    return extra if all(_is_nothing(release, name, by_output.get(name), taken) for name in left) else []


def _is_nothing(release: TensorSource, name: str, value: ValueFreedom | None, taken: set[str]) -> bool:
    """Whether nothing is left of a bias once it has taken over that of the values."""
    bias = release.tensor(name).double()
    added: Tensor = bias * 0
    if value is not None and value.bias in taken:
        added = of_values(value, release.tensor(value.block.output.weight), release.tensor(value.bias).double())
    return bool((bias + added).norm() <= NOTHING * bias.norm())


def _biases_of_blocks(architecture: Architecture) -> set[str]:
    names: set[str | None] = set()
    for block in architecture.blocks:
        names.add(output_bias(block))
        heads = [block.gate, block.up] if isinstance(block, FeedForward) else block.projections
        names |= {one.bias for one in heads if one is not None}
    return {name for name in names if name is not None}
