"""One network of layers of several: what mergekit's slices describe, as a checkpoint that is read like any other.

Layers are numbered anew; what lies before them is the first model's, what lies behind them the last one's. The
configuration and the other files are a donor's, with the number of layers, and what is listed for each of them, put
right. Nothing is read before a tensor is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unmergeable.checkpoint.correspondence import corresponding_names
from unmergeable.checkpoint.header import TensorSpec, save_file_order
from unmergeable.checkpoint.index import CheckpointIndex, identified, lay_out_virtual
from unmergeable.checkpoint.source import (
    ChunkSource,
    Extent,
    IndexedSource,
    StoredSource,
    TensorSource,
    shapes_of,
    tensor_bytes,
)
from unmergeable.checkpoint.spare import is_input_embedding, is_output_head, is_tied
from unmergeable.checkpoint.vocabulary import read_vocabulary
from unmergeable.errors import BadInput, Mismatch
from unmergeable.merges.members import Member, differing_settings, require_same_architecture

# Where the layers of a model are counted: the number behind one of these.
_STACKS = r"(?:layers?|h|blocks?|resblocks|transformer_blocks)"
_LAYER = re.compile(rf"(?P<stack>(?:.*?\.)??{_STACKS})\.(?P<index>\d+)\.")
_BEFORE_THE_LAYERS = re.compile(r"(?!embed_out)(.*\.)?\w*(emb|wte|wpe|shared|patch|cls_token)")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PER_LAYER = re.compile(r"layer|block", re.IGNORECASE)
_SHARD_BYTES = 5_000_000_000


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers that a tensor lies in, and the number of its layer; None outside."""
    match = _LAYER.match(name)
    return None if match is None else (match["stack"], int(match["index"]))


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack."""
    depths: dict[str, int] = {}
    for stack, index in filter(None, map(layer_of, names)):
        depths[stack] = max(depths.get(stack, 0), index + 1)
    return depths


def lies_before(name: str) -> bool:
    """Whether a tensor outside the layers comes before them."""
    return _BEFORE_THE_LAYERS.match(name) is not None


@dataclass(frozen=True)
class Piece:
    """Layers ``first`` to ``stop`` of a model; ``stop`` None means all."""

    source: TensorSource
    first: int = 0
    stop: int | None = None


def stacked(pieces: Sequence[Piece], donor: TensorSource | None = None) -> TensorSource:
    """The network whose layers are those of the pieces, one behind another; a model that is whole is itself.

    Args:
        pieces: at least one.
        donor: whose configuration and files the network has; None for those of the first piece.

    Raises:
        BadInput: a range that ends behind the layers, or models whose layers cannot be told.
        Mismatch: the models are not of one architecture, or their vocabularies differ where that matters.
    """
    first = pieces[0].source
    donor = donor or first
    position = 0
    for piece in pieces:
        if piece.source is not first or piece.first != position:
            break
        position = piece.stop if piece.stop is not None else -1
    else:
        counted = _section(first.config)[1] or position
        if donor is first and (position < 0 or (set(depths_of(first.names).values()) == {position} == {counted})):
            return first
    return _Stacked.of(pieces, donor)


class _Stacked(IndexedSource):
    def __init__(self, index: CheckpointIndex, origins: Mapping[str, tuple[TensorSource, str]], label: str) -> None:
        super().__init__(index)
        self._origins, self._label = origins, label

    @classmethod
    def of(cls, pieces: Sequence[Piece], donor: TensorSource) -> TensorSource:
        stacks = [_OneStack.of(piece) for piece in pieces]
        head, tail = stacks[0], stacks[-1]
        for stack in stacks[1:]:
            require_same_architecture(head.source, stack.source)
            if stack.kinds - head.kinds:
                raise Mismatch(_other_layers(head, stack))
        origins = head.outside(before=True)
        position = 0
        for stack in stacks:
            for index in range(stack.first, stack.stop):
                origins |= {
                    f"{head.prefix}.{position}.{rest}": (stack.source, name) for rest, name in stack.layers[index]
                }
                position += 1
        layers = [(stack.source.config, index) for stack in stacks for index in range(stack.first, stack.stop)]
        changes = _resized(donor.config, layers)
        origins |= _behind(head, tail, donor, changes)
        first = Member(donor.description, donor, {})
        sources = dict.fromkeys(stack.source for stack in stacks)
        notes = [
            note
            for source in sources
            if source is not donor
            for note in differing_settings(first, Member(source.description, source, {}))
        ]
        label = " + ".join(f"{s.source.description}[{s.first}:{s.stop}]" for s in stacks)
        return cls(_index(donor, origins, sources, changes, notes), origins, label)

    @property
    def description(self) -> str:
        return self._label

    def tensor(self, name: str) -> torch.Tensor:
        self.spec(name)
        source, own = self._origins[name]
        return source.tensor(own)

    def stored(self, name: str) -> Extent | None:
        source, own = self._origins[name]
        return source.stored(own) if isinstance(source, StoredSource) else None

    def raw_chunks(
        self, name: str, chunk_bytes: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[memoryview]:
        source, own = self._origins[name]
        if isinstance(source, ChunkSource):
            yield from source.raw_chunks(own, chunk_bytes, start=start, stop=stop)
            return
        data = tensor_bytes(source.tensor(own))
        end = len(data) if stop is None else stop
        for begin in range(start, end, chunk_bytes):
            yield data[begin : min(begin + chunk_bytes, end)]


@dataclass(frozen=True)
class _OneStack:
    """A piece, its layers by number: what each tensor is called inside its layer, and as a whole."""

    source: TensorSource
    prefix: str
    first: int
    stop: int
    layers: Mapping[int, Sequence[tuple[str, str]]]

    @classmethod
    def of(cls, piece: Piece) -> _OneStack:
        depths = depths_of(piece.source.names)
        if len(depths) != 1:
            found = ", ".join(f"{depth} under {stack}" for stack, depth in depths.items()) or "none"
            raise BadInput(
                f"{piece.source.description} has layers in more than one place or none ({found}), and cannot be cut "
                "into slices: merge it whole, with models instead of slices."
            )
        ((prefix, depth),) = depths.items()
        # Layers behind those that the configuration counts predict further tokens.
        counted = _section(piece.source.config)[1]
        depth = min(depth, counted or depth)
        stop = depth if piece.stop is None else piece.stop
        if stop > depth:
            raise BadInput(
                f"layer_range [{piece.first}, {stop}] ends behind the {depth} layers of {piece.source.description}: "
                f"let it end at {depth} at most."
            )
        layers: dict[int, list[tuple[str, str]]] = {}
        for name in piece.source.names:
            if (place := layer_of(name)) is not None:
                layers.setdefault(place[1], []).append((name.removeprefix(f"{prefix}.{place[1]}."), name))
        return cls(piece.source, prefix, piece.first, stop, layers)

    @property
    def kinds(self) -> frozenset[frozenset[tuple[str, tuple[int, ...]]]]:
        """What layers there are: networks may have several kinds."""
        return frozenset(
            frozenset((rest, tuple(self.source.spec(name).shape)) for rest, name in layer)
            for layer in self.layers.values()
        )

    def outside(self, *, before: bool) -> dict[str, tuple[TensorSource, str]]:
        names = (name for name in self.source.names if layer_of(name) is None and lies_before(name) == before)
        return {name: (self.source, name) for name in names}


def _other_layers(head: _OneStack, stack: _OneStack) -> str:
    """The line for a layer that the first model has none like: what tells it from the one that is most like it."""
    other = min(stack.kinds - head.kinds, key=sorted)
    like = max(head.kinds, key=lambda kind: (len(kind & other), sorted(kind)))
    ours, theirs = dict(like), dict(other)
    name = min(rest for rest in ours.keys() | theirs.keys() if ours.get(rest) != theirs.get(rest))
    found = [list(shape) if (shape := layer.get(name)) is not None else "missing" for layer in (ours, theirs)]
    return (
        f"{name} of a layer: {found[0]} in {head.source.description} but {found[1]} in {stack.source.description}; "
        "stack layers of models of one architecture and size."
    )


def _behind(
    head: _OneStack, tail: _OneStack, donor: TensorSource, changes: dict[str, Any]
) -> dict[str, tuple[TensorSource, str]]:
    """What comes behind the layers, under the first model's names; an output head as the donor's configuration has it.

    Where the donor ties the head to the embedding and the last model has one of its own, the configuration says that
    it is not tied; where the donor has one of its own and the last model does not, the embedding it is tied to is it.
    """
    if tail.source is head.source:
        return tail.outside(before=False)
    found = corresponding_names(shapes_of(head.source), shapes_of(tail.source))
    theirs = {own: name for name, own in found.items()}
    behind = {theirs.get(name, name): origin for name, origin in tail.outside(before=False).items()}
    embedding = next((name for name in found if is_input_embedding(name)), None)
    if embedding is not None:
        _require_same_rows(head.source, embedding, tail.source, found[embedding])
    heads = [name for name in behind if is_output_head(name)]
    if is_tied(tail.source.config) is not True:
        if heads and is_tied(donor.config) is True:
            changes |= {"tie_word_embeddings": False}
        return behind
    for name in heads:  # second copies of its embedding
        del behind[name]
    if is_tied(donor.config) is not True and embedding is not None:
        wanted = [name for name in head.source.names if is_output_head(name) and name != embedding]
        behind |= dict.fromkeys(wanted, (tail.source, found[embedding]))
    return behind


def _require_same_rows(first: TensorSource, name: str, last: TensorSource, own: str) -> None:
    ours, theirs = (list(source.spec(embedding).shape) for source, embedding in ((first, name), (last, own)))
    if ours != theirs:
        raise Mismatch(
            f"{name}: {ours} in {first.description} but {theirs} in {last.description}, whose output head the "
            "merge would have: begin and end with models of one vocabulary."
        )


def _section(config: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Where a configuration counts layers (``None`` for the top, or the name of a part), and how many there are."""
    for part, values in ((None, config), ("text_config", config.get("text_config"))):
        if isinstance(values, Mapping):
            for key in _COUNTS:
                if isinstance(values.get(key), int):
                    return part, values[key]
    return None, None


def _resized(config: Mapping[str, Any], layers: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """What a configuration says otherwise of a network of these layers."""
    part, count = _section(config)
    if count is None:
        return {}
    values = config if part is None else config[part]
    changes: dict[str, Any] = {key: len(layers) for key in _COUNTS if values.get(key) == count}
    for key, listed in values.items():
        if isinstance(listed, list) and len(listed) == count and _PER_LAYER.search(key):
            changes[key] = [_listed(own, key, index, listed) for own, index in layers]
    return changes if part is None else {part: changes}


def _listed(config: Mapping[str, Any], key: str, index: int, otherwise: Sequence[Any]) -> Any:
    part, _ = _section(config)
    own = (config if part is None else config[part]).get(key)
    values = own if isinstance(own, list) and index < len(own) else otherwise
    return values[min(index, len(values) - 1)]


def _index(
    donor: TensorSource,
    origins: Mapping[str, tuple[TensorSource, str]],
    sources: Iterable[TensorSource],
    changes: Mapping[str, Any],
    notes: Iterable[str],
) -> CheckpointIndex:
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, (source, own) in origins.items():
        spec = source.spec(own)
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + spec.nbytes > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    count = len(shards)
    named = {
        "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors": {
            name: shard[name] for name in save_file_order(shard)
        }
        for number, shard in enumerate(shards, start=1)
    }
    entries, files = lay_out_virtual(named, {"format": "pt"})
    indexes = [source.index for source in sources]
    config = {**donor.config, **changes}
    if (inner := changes.get("text_config")) is not None:
        config["text_config"] = {**donor.config["text_config"], **inner}
    return identified(
        replace(
            donor.index,
            config=config,
            entries=entries,
            shards=files,
            weights_index_file=None,
            weights_index=None,
            weights_index_name=None,
            other_files={path: name for index in indexes for path, name in index.other_files.items()},
            read_files={
                path: name
                for index in indexes
                for path, name in index.tensor_files.items()
                if path not in index.other_files
            },
            states={path: state for index in (donor.index, *indexes) for path, state in index.states.items()},
            config_changes={**donor.index.config_changes, **changes},
            names_on_disk={},
            notes=(*dict.fromkeys(note for index in indexes for note in index.notes), *notes),
        )
    )


def require_one_vocabulary(sources: Iterable[TensorSource]) -> None:
    """Require models of one stack to have the same tokens, where a choice of a tokenizer moves rows about.

    Raises:
        BadInput: naming two that do not.
    """
    known = {source.description: read_vocabulary(source.index.side_files) for source in sources}
    rows = {name: vocabulary.rows for name, vocabulary in known.items() if vocabulary is not None}
    for name, vocabulary in rows.items():
        if vocabulary != next(iter(rows.values())):
            raise BadInput(
                f"tokenizer: {next(iter(rows))} and {name} have other tokens, and slices put one behind the other: "
                "leave the choice of a tokenizer out."
            )
