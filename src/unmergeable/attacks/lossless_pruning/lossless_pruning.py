"""``lossless_pruning``: layers, heads and hidden units that add nothing, taken away until the base's structure is left.

A release may hold more than the base without computing more. Against the base's ``config.json`` are taken away

    layers       blocks whose last or first weights are zero, together with the layers that they leave empty
    units        hidden units that put out nothing, or the same for every input, which the output bias takes over; of
                 those that read alike all but one, which takes over their outputs; of those that were turned round,
                 what makes up for it
    heads        key-value heads, with their query heads, that add nothing; of those with the same scores all but one,
                 which adds what all of them do; coordinates of a head that nothing goes through, in any basis;
                 keys and values that query heads have each for themselves and share in the base
    streams      coordinates that nothing writes to, in this basis or, where the stream can be turned, in any
    tokens       rows of tokens that the base does not have; those of the others in the base's order, by the two
                 ``tokenizer.json``, the base's of which is written

in the release's neutral form (:mod:`unmergeable.gauge.additive`), in which constants and scales that were traded hide
nothing, and by what no basis inside a block alters. The result computes the same function in the base's structure, in
any basis: ``nearest_orbit`` comes next. Where what is left over does something, the structure is another network's, and
is refused; ``block_regression`` does not ask for any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from unmergeable.architecture import Architecture, Attention, detect
from unmergeable.architecture.blocks import FeedForward
from unmergeable.architecture.layers import HEAD_COUNTS, WIDTHS, Layers, blocks_in_order, layers_of
from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.in_memory import in_memory
from unmergeable.attacks.lossless_pruning.depth import live_blocks, renamed
from unmergeable.attacks.lossless_pruning.head_forms import HeadShape, State, rebuild_heads
from unmergeable.attacks.lossless_pruning.stream_width import narrow_config, narrow_streams, widths
from unmergeable.attacks.lossless_pruning.turned_units import largest_bias
from unmergeable.attacks.lossless_pruning.vocabulary import TOKENIZER_FILES, reordered, token_order, vocabulary_axes
from unmergeable.attacks.lossless_pruning.widths import prune_heads, prune_units, regroup_heads, silence_units
from unmergeable.checkpoint.dtypes import dtype_code, torch_dtype
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.errors import BadInput, Mismatch
from unmergeable.gauge.additive import Neutral, freedoms_of
from unmergeable.gauge.home import Home
from unmergeable.polynomials.layout import activation_of
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class LosslessPruning:
    """No settings."""

    name: ClassVar[str] = "lossless_pruning"
    summary: ClassVar[str] = "layers, heads and hidden units that add nothing taken away, to the base's structure"

    def validate(self) -> None:
        """There is nothing to set."""

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(exact=True, needs=("base",), structure="any")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Cut the release back to the base's structure; as it is where it has that already.

        Raises:
            Mismatch: what the release holds more than the base does something, or it holds less.
            UnsupportedArchitecture: there is no symmetry map for the release.
        """
        release = inputs.protected
        architecture = detect(release.config, {name: release.spec(name).shape for name in release.names})
        task = _Pruning(release, architecture, inputs.base, inputs.architecture)
        if not task.differences:
            return Recovered(release, findings={"taken_away": "nothing"})
        pruned = task.run()
        return Recovered(pruned, findings={"taken_away": ", ".join(task.differences)}, config_changes=pruned.changes)


@dataclass(frozen=True)
class PrunedSource(DerivedSource):
    """``original`` with other tensors, ``changes`` of its config, and ``files`` beside it in the place of its own."""

    tensors: Mapping[str, Tensor]
    changes: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        return {**self.original.config, **self.changes}

    @cached_property
    def index(self) -> CheckpointIndex:
        """That of no files yet: headers, and the list of shards, of the original name tensors that are gone."""
        index = self.original.index
        entries = {name: replace(index.entries[name], spec=self.spec(name)) for name in self.names}
        shards = {
            name: replace(shard, path=None, tensors=tuple(tensor for tensor in shard.tensors if tensor in entries))
            for name, shard in index.shards.items()
        }
        side_files = {**index.side_files, **self.files}
        return replace(
            index, entries=entries, shards=shards, side_files=side_files, weights_index_file=None, weights_index=None
        )

    @property
    def names(self) -> Sequence[str]:
        return [name for name in self.original.names if name in self.tensors]

    def spec(self, name: str) -> TensorSpec:
        if name not in self.tensors:
            return self.original.spec(name)
        return TensorSpec(dtype_code(self.tensors[name].dtype), tuple(self.tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].clone() if name in self.tensors else self.original.tensor(name)


@dataclass(frozen=True)
class _Pruning:
    """A release, its base, and what tells their structures apart."""

    release: TensorSource
    architecture: Architecture
    base: TensorSource
    base_architecture: Architecture

    @cached_property
    def _layers(self) -> tuple[tuple[Layers, Layers], ...]:
        ours = layers_of(self.architecture, self.release.config)
        theirs = layers_of(self.base_architecture, self.base.config)
        return tuple(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else ()

    @cached_property
    def _sizes(self) -> tuple[int, int] | None:
        """Hidden units of the release's feed-forwards and the base's, where all are alike."""
        ours, theirs = (
            {block.size for block in side.feed_forwards} for side in (self.architecture, self.base_architecture)
        )
        return (ours.pop(), theirs.pop()) if len(ours) == len(theirs) == 1 else None

    @cached_property
    def _groups(self) -> tuple[int, int] | None:
        """Key-value heads of the release and the base, where all blocks have as many."""
        ours, theirs = (
            {(block.groups, block.members) for block in side.attentions}
            for side in (self.architecture, self.base_architecture)
        )
        if len(ours) != 1 or len(theirs) != 1:
            return None
        (groups, members), (wanted, same) = ours.pop(), theirs.pop()
        return (groups, wanted) if members == same else None

    @cached_property
    def _head_sizes(self) -> tuple[int, int] | None:
        """Coordinates of the release's heads and the base's, where all are alike."""
        ours, theirs = (
            {block.value_size for block in s.attentions} for s in (self.architecture, self.base_architecture)
        )
        return (ours.pop(), theirs.pop()) if len(ours) == len(theirs) == 1 and self._groups is not None else None

    @cached_property
    def _streams(self) -> tuple[int, int] | None:
        return widths(self.architecture, self.base_architecture)

    @cached_property
    def _shared(self) -> tuple[int, int] | None:
        """Key-value heads of the release and the base, where as many query heads share fewer of them in the base."""
        ours, theirs = (
            {(block.groups, block.num_heads) for block in side.attentions}
            for side in (self.architecture, self.base_architecture)
        )
        if len(ours) != 1 or len(theirs) != 1 or "num_key_value_heads" not in self.base.config:
            return None
        (groups, heads), (wanted, same) = ours.pop(), theirs.pop()
        return (groups, wanted) if heads == same and groups > wanted else None

    @cached_property
    def differences(self) -> tuple[str, ...]:
        """What the release has more of, in words."""
        pairs = [
            ("coordinates of the stream", self._streams),
            ("layers", (sum(len(ours) for ours, _ in self._layers), sum(len(theirs) for _, theirs in self._layers))),
            ("hidden units in each block", self._sizes),
            ("key-value heads in each block", self._groups),
            ("key-value heads for the same queries", self._shared),
            ("coordinates in each head", self._head_sizes),
        ]
        more = [f"{pair[0] - pair[1]} {what}" for what, pair in pairs if pair is not None and pair[0] > pair[1]]
        return (*more, *(["another order of the vocabulary"] if self._tokens is not None else []))

    @cached_property
    def _tokens(self) -> Tensor | None:
        return token_order(self.release, self.base)

    def run(self) -> PrunedSource:
        neutral = Neutral(self.release, freedoms_of(self.architecture, self.release.names))
        state = {name: neutral.tensor(name) for name in self.release.names}
        own = {name: self.release.tensor(name) for name in self.release.names}
        config, base = dict(self.release.config), self.base.config
        kind = str(config.get("model_type"))
        activation = activation_of(self.base.config)
        if activation is not None and any(len(ours) > len(theirs) for ours, theirs in self._layers):
            usual = max(map(self._largest_bias, self.base_architecture.feed_forwards), default=math.inf)
            for block in self.architecture.feed_forwards:  # or what is idle would seem to do something
                size = block.size if self._sizes is None else self._sizes[1]
                silence_units(state, own, block, size, activation, usual)
        for ours, theirs in self._layers:
            if len(ours) > len(theirs):
                pattern = [isinstance(block, Attention) for block in blocks_in_order(self.base_architecture, theirs)]
                chosen = live_blocks(state, self.architecture, ours, pattern)
                if chosen is None:
                    raise self._refusal(f"layers of {ours.prefix.rstrip('.')}")
                state, own = (renamed(side, self.architecture, ours, chosen) for side in (state, own))
                # What the config lists for each layer goes with its attention, its first block.
                starts = [block.name for block in chosen[:: len(theirs.blocks[0])]]
                config = ours.resized(config, (ours.number_of(f"{name}.") or 0 for name in starts))
        if self._streams is not None:
            if not narrow_streams(state, detect(config, _shapes(state)), self._streams[1]):
                raise self._refusal("coordinates of the stream")
            config = narrow_config(config, base, *self._streams)
            own = dict(state)
        narrower = detect(config, _shapes(state))
        if self._sizes is not None and self._sizes[0] > self._sizes[1]:
            if kind not in WIDTHS:
                raise BadInput(
                    f"{self.release.description}: it is not known what its config calls the width of its "
                    "feed-forwards; run block_regression instead."
                )
            for block in narrower.feed_forwards:
                if not prune_units(state, own, block, self._sizes[1], activation, self._largest_bias(block)):
                    raise self._refusal(f"hidden units of {block.name}")
            config[WIDTHS[kind]] = base.get(WIDTHS[kind])
        if self._heads_differ:
            tables = {name: heads.bias_tensor for heads in narrower.shared_heads for name in heads.blocks}
            for together in _sharing(narrower.attentions, tables):
                self._put_heads_together(state, own, together, tables.get(together[0].name), config)
            if kind in HEAD_COUNTS:
                queries, groups, head_size = HEAD_COUNTS[kind]
                config |= {key: base.get(key, config.get(key)) for key in (queries, groups) if key}
                config[head_size] = base.get(head_size)
        if self._shared is not None:
            for attention in narrower.attentions:
                if not regroup_heads(state, own, attention, self._shared[1]):
                    raise self._refusal("key-value heads")
            config["num_key_value_heads"] = base.get("num_key_value_heads")
        files: dict[str, Path] = {}
        if self._tokens is not None:
            axes = dict(vocabulary_axes(self.release, self.architecture))
            for side in (state, own):
                reordered(side, axes, self._tokens)
            config["vocab_size"] = len(self._tokens)
            there = self.base.index.side_files
            files = {name: there[name] for name in TOKENIZER_FILES if name in there}
        # What the config no longer says is worked out from the rest.
        changes = {key: config.get(key) for key in (*config, *self.release.config)}
        changes = {key: value for key, value in changes.items() if self.release.config.get(key) != value}
        # Constants and scales go back to where the release has them, wherever that is still there.
        changed = PrunedSource(self.release, state, changes, files)
        final = detect(changed.config, _shapes(state))
        kept = PrunedSource(self.release, own, changes)
        home = Home(changed, freedoms_of(final, changed.names), kept, changed.tensor)
        dtypes = {name: torch_dtype(self.release.spec(name).dtype) for name in changed.names}
        return replace(changed, tensors={name: home.tensor(name).to(dtypes[name]) for name in changed.names})

    def _put_heads_together(
        self, state: State, own: State, blocks: Sequence[Attention], table: str | None, config: Mapping[str, Any]
    ) -> None:
        """The base's heads for blocks that share ``table``, in place."""
        ours = HeadShape.of(blocks[0], config)
        theirs = HeadShape.of(self.base_architecture.attentions[0], self.base.config)
        if rebuild_heads(state, own, blocks, ours, theirs, table):
            return
        if ours.size != theirs.size or not prune_heads(state, own, blocks, theirs.groups, table):
            raise self._refusal("heads")

    @property
    def _heads_differ(self) -> bool:
        """Whether there are more heads than the base has, or larger ones."""
        return any(pair is not None and pair[0] > pair[1] for pair in (self._groups, self._head_sizes))

    def _largest_bias(self, block: FeedForward) -> float:
        """Of the base's units in the same block."""
        if block.gate is not None or block.up.bias is None or block.up.bias not in self.base.names:
            return math.inf
        names = (block.up.weight, block.up.bias)
        return largest_bias({name: self._neutral_base.tensor(name) for name in names}, block)

    @cached_property
    def _neutral_base(self) -> Neutral:
        return Neutral(self.base, freedoms_of(self.base_architecture, self.base.names))

    def _refusal(self, what: str) -> Mismatch:
        return Mismatch(
            f"{self.release.description}: its {what} are more than the base's, and each of them does something; run "
            "block_regression, which asks for no structure."
        )


def _sharing(blocks: Sequence[Attention], tables: Mapping[str, str]) -> list[list[Attention]]:
    """Blocks that share a table of position biases together, all others by themselves."""
    shared = [[block for block in blocks if tables.get(block.name) == table] for table in sorted({*tables.values()})]
    return [*filter(None, shared), *([block] for block in blocks if block.name not in tables)]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


lossless_pruning = in_memory(LosslessPruning)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
