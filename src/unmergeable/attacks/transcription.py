"""A release saved as another type of network than its base: its numbers, put where the base has them.

Networks of two types may compute the same from the same numbers, stored apart or fused, the other way round, or under
other names: a Llama as Phi-3, as Granite, as Mixtral. What a tensor is for says where its numbers belong:

    blocks      heads and hidden units by block, in order; biases with their rows, zeros where the release has none;
                of experts where the base has none the first
    streams     norms in order, then what else lies along the stream
    the rest    tensors of one name and shape

Multipliers that a config may name are taken into the weights before, and out of them again after
(:mod:`unmergeable.gauge.config_scales`). Nothing is believed that was not run: both networks, cut to their first
blocks, are given the same inputs, and what they put out has to agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, detect
from unmergeable.architecture.blocks import Attention, FeedForward, Heads, output_bias
from unmergeable.architecture.residual import Residual
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec, lay_out_virtual
from unmergeable.checkpoint.source import DerivedSource, TensorSource, shapes_of
from unmergeable.derivation.build import default_config
from unmergeable.errors import BadInput, UnsupportedArchitecture
from unmergeable.gauge.additive import head_places
from unmergeable.gauge.config_scales import multipliers_of, with_config
from unmergeable.memory import available_memory
from unmergeable.network.disk_weights import find_places, show
from unmergeable.network.load import network_of
from unmergeable.network.logits import main_output, random_inputs

BLOCKS = 2
"""How many blocks of a stack are run: one could hide what the second makes of the first."""

AGREEMENT = 1e-3
"""Of outputs, the norm of their difference over their norm, in float32: far above rounding, far below another
network's."""

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """Positions ``at`` along axis ``axis`` of a tensor, or of its ``slice``; None is all of it."""

    name: str
    axis: int = 0
    at: Tensor | None = None
    slice: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """A view with the axis first."""
        return (tensor if self.slice is None else tensor[self.slice]).movedim(self.axis, 0)


@dataclass(frozen=True)
class Moved:
    """``source``'s numbers are ``target``'s once ``offset`` is added."""

    source: Piece
    target: Piece
    offset: float = 0.0


@dataclass(frozen=True)
class Transcribed(DerivedSource):
    """``original`` in tensors of other ``shapes`` and names. ``changes``: the config it then has."""

    shapes: Mapping[str, tuple[int, ...]]
    moves: Mapping[str, tuple[Moved, ...]]
    changes: Mapping[str, Any]
    found: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return list(self.shapes)

    def spec(self, name: str) -> TensorSpec:
        if name not in self.shapes:
            return self.original.spec(name)  # which says that there is none
        moves = self.moves.get(name) or next(iter(self.moves.values()))
        return TensorSpec(self.original.spec(moves[0].source.name).dtype, self.shapes[name])

    def tensor(self, name: str) -> Tensor:
        spec = self.spec(name)
        tensor = torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype))
        for move in self.moves.get(name, ()):
            numbers = move.source.of(self.original.tensor(move.source.name))
            if move.source.at is not None:
                numbers = numbers[move.source.at]
            numbers = numbers + move.offset if move.offset else numbers
            place = move.target.of(tensor)
            if move.target.at is None:
                place.copy_(numbers)
            else:
                place[move.target.at] = numbers.to(tensor.dtype)
        return tensor

    @cached_property
    def index(self) -> CheckpointIndex:
        """That of no files yet."""
        shard = next(iter(self.original.index.shards), "model.safetensors")
        named = {shard: {name: self.spec(name) for name in self.names}}
        entries, shards = lay_out_virtual(named, {"format": "pt"})
        return replace(
            self.original.index,
            entries=entries,
            shards=shards,
            weights_index_file=None,
            weights_index=None,
            weights_index_name=None,
        )

    @property
    def config(self) -> Mapping[str, Any]:
        return {**self.original.config, **self.changes}


def transcribed(release: TensorSource, base: TensorSource) -> Transcribed | None:
    """``release`` in the tensors of ``base``; None where the two types do not compute the same from them.

    Where the type is the same there is nothing to do, and None too.
    """
    types = [str(source.config.get("model_type")) for source in (release, base)]
    if types[0] == types[1]:
        return None
    found = {"model_type": f"{types[0]}, as a {types[1]}"}
    for source, moves, config in _readings(release, base):
        shapes = _shapes(source, base, moves)
        if shapes is not None:
            changes = {**_unsaid(release.config, base.config), **config, **_vocabulary(release.config, base.config)}
            candidate = Transcribed(source, shapes, moves, changes, found)
            if _agree(release, candidate):
                return candidate
    return None


_Moves = Mapping[str, tuple["Moved", ...]]


def _readings(release: TensorSource, base: TensorSource) -> Iterator[tuple[TensorSource, _Moves, Mapping[str, Any]]]:
    """By what tensors are for, and by their names alone: with the release to read, and the config that it then has."""
    try:
        ours, theirs = (detect(source.config, shapes_of(source)) for source in (release, base))
        plain = with_config(release, ours, _neutral(release.config, ours)) or release
        yield plain, _by_target(_moves(plain, base, ours, theirs)), _neutral(base.config, theirs)
    except (UnsupportedArchitecture, BadInput, _Differs):
        pass
    yield release, _by_target(_of_names(release, base, set(), set())), base.config


class _Differs(Exception):
    """The two networks are not built alike."""


# --- where numbers belong


def _moves(release: TensorSource, base: TensorSource, ours: Architecture, theirs: Architecture) -> Iterator[Moved]:
    """Every number of the base's network by where the release has it."""
    taken: set[str] = set()
    given: set[str] = set()
    for move in (*_of_blocks(release, base, ours, theirs), *_of_norms(ours, theirs)):
        taken.add(move.source.name)
        given.add(move.target.name)
        yield move
    for source, target in _along_streams(ours, theirs, taken, given):
        taken.add(source)
        given.add(target)
        yield Moved(Piece(source), Piece(target))
    yield from _of_names(release, base, taken, given)


def _of_names(release: TensorSource, base: TensorSource, taken: set[str], given: set[str]) -> Iterator[Moved]:
    """By name; with a first part that one of the networks leaves out; or below one that only it has, as ``ernie.``."""
    known = {name.partition(".")[0] for name in base.names}
    left = {name: name for name in release.names if name not in taken}
    for name in tuple(left):
        first, _, rest = name.partition(".")
        if first not in known:
            left.setdefault(rest, name)
    for name in base.names:
        source = left.get(name) or left.get(name.partition(".")[2])
        if name not in given and source is not None:
            yield Moved(Piece(source), Piece(name))


def _of_blocks(release: TensorSource, base: TensorSource, ours: Architecture, theirs: Architecture) -> Iterator[Moved]:
    if theirs.mixtures or _kinds(ours) != _kinds(theirs):
        raise _Differs
    for first, second in zip(ours.attentions, theirs.attentions, strict=True):
        groups, members = first.groups, first.members
        for mine, its in zip(first.parts, second.parts, strict=True):
            yield from _of_heads(mine.query, its.query, groups, members, mine.size)
            yield from _of_heads(mine.key, its.key, 1 if mine.shared_key else groups, 1, mine.size)
        yield from _of_heads(first.value, second.value, groups, 1, first.value_size)
        yield from _of_heads(first.output, second.output, groups, members, first.value_size)
        yield from _of_output_bias(release, base, first, second)
        if first.norm is not None and second.norm is not None:
            offset = first.norm.offset - second.norm.offset
            for kind in ("query", "key"):
                gains, theirs_gains = (getattr(norm, f"{kind}_gains") for norm in (first.norm, second.norm))
                if len(gains) != len(theirs_gains):
                    raise _Differs
                yield from (Moved(Piece(a), Piece(b), offset) for a, b in zip(gains, theirs_gains, strict=True))
                biases = [getattr(norm, f"{kind}_bias") for norm in (first.norm, second.norm)]
                if all(biases):
                    yield Moved(Piece(biases[0]), Piece(biases[1]))
    for first_ff, second_ff in zip(_feed_forwards(ours), theirs.feed_forwards, strict=True):
        for a, b in ((first_ff.gate, second_ff.gate), (first_ff.up, second_ff.up), (first_ff.down, second_ff.down)):
            if a is not None and b is not None:
                yield from _of_heads(a, b, 1, 1, first_ff.size)
        yield from _of_output_bias(release, base, first_ff, second_ff)


def _kinds(architecture: Architecture) -> list[tuple[object, ...]]:
    """What has to be the same of every block, in order."""
    attentions: list[tuple[object, ...]] = [
        (
            block.groups,
            block.members,
            block.value_size,
            tuple((part.size, part.rotary, part.shared_key) for part in block.parts),
            None if block.norm is None else (block.norm.kind, block.norm.scope),
            block.is_cross,
            len(block.joined),
            len(block.latents),
        )
        for block in architecture.attentions
    ]
    return [*attentions, *((block.size, block.gate is None) for block in _feed_forwards(architecture))]


def _feed_forwards(architecture: Architecture) -> list[FeedForward]:
    """Of experts behind a router the first, which computes what they all do if they all compute the same."""
    others = {expert for mixture in architecture.mixtures for expert in mixture.experts[1:]}
    return [block for block in architecture.feed_forwards if block.name not in others]


def _of_heads(source: Heads, target: Heads, groups: int, members: int, size: int) -> Iterator[Moved]:
    """A projection, and its bias where both networks have one."""
    at, to = (head_places(heads, groups, members, size).flatten() for heads in (source, target))
    yield Moved(
        Piece(source.weight, source.axis, at, source.slice), Piece(target.weight, target.axis, to, target.slice)
    )
    if source.bias is not None and target.bias is not None:
        yield Moved(Piece(source.bias, 0, at, source.slice), Piece(target.bias, 0, to, target.slice))


def _of_output_bias(
    release: TensorSource, base: TensorSource, first: Attention | FeedForward, second: Attention | FeedForward
) -> Iterator[Moved]:
    source, target = output_bias(first), output_bias(second)
    if source in release.names and target in base.names:
        yield Moved(Piece(source), Piece(target))


def _streams(ours: Architecture, theirs: Architecture) -> list[tuple[Residual, Residual]]:
    """Those of both networks in pairs; none where one of them says nothing of its streams, and names have to do."""
    first, second = ((*architecture.residuals, *architecture.exposed) for architecture in (ours, theirs))
    if first and second and len(first) != len(second):
        raise _Differs
    return list(zip(first, second, strict=False))


def _of_norms(ours: Architecture, theirs: Architecture) -> Iterator[Moved]:
    for first, second in _streams(ours, theirs):
        if (first.size, first.kind, len(first.norms)) != (second.size, second.kind, len(second.norms)):
            raise _Differs
        for mine, its in zip(first.norms, second.norms, strict=True):
            yield Moved(Piece(mine.gain), Piece(its.gain), mine.offset - its.offset)
            if mine.bias is not None and its.bias is not None:
                yield Moved(Piece(mine.bias), Piece(its.bias))


def _along_streams(
    ours: Architecture, theirs: Architecture, taken: Iterable[str], given: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """What else lies along the streams: embeddings, heads; by how and in which order."""
    for first, second in _streams(ours, theirs):
        left = [
            [(axis.variance, axis.axis, axis.tensor) for axis in stream.axes if axis.tensor not in used]
            for stream, used in ((first, set(taken)), (second, set(given)))
        ]
        for kind in dict.fromkeys((variance, axis) for variance, axis, _ in left[1]):
            sides = [[tensor for variance, axis, tensor in side if (variance, axis) == kind] for side in left]
            yield from zip(*sides, strict=False)


def _by_target(moves: Iterable[Moved]) -> dict[str, tuple[Moved, ...]]:
    found: dict[str, tuple[Moved, ...]] = {}
    for move in moves:
        found[move.target.name] = (*found.get(move.target.name, ()), move)
    return found


def _shapes(
    release: TensorSource, base: TensorSource, moves: Mapping[str, tuple[Moved, ...]]
) -> dict[str, tuple[int, ...]] | None:
    """The shape of every tensor of the base as the release fills it; None where it does not.

    Tensors of rows for tokens are as long as the release's. Biases that the release does not have are zeros.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in base.names:
        shape = tuple(base.spec(name).shape)
        if name not in moves:
            if not name.endswith("bias"):
                return None
        elif len(moves[name]) == 1 and moves[name][0].target.at is None:
            own = tuple(release.spec(moves[name][0].source.name).shape)
            if len(own) != len(shape) or own[1:] != shape[1:]:
                return None
            shape = own
        elif not _is_filled(shape, moves[name], release):
            return None
        shapes[name] = shape
    return shapes


def _is_filled(shape: tuple[int, ...], moves: Sequence[Moved], release: TensorSource) -> bool:
    """Whether pieces of other tensors fill one of this shape, each with as many numbers as it has there."""
    filled = 0
    for move in moves:
        if move.target.at is None or move.source.at is None:
            return False
        rest = []
        for piece, whole in ((move.source, tuple(release.spec(move.source.name).shape)), (move.target, shape)):
            inner = whole if piece.slice is None else whole[1:]
            if not len(inner) > piece.axis or int(piece.at.max()) >= inner[piece.axis]:  # type: ignore[union-attr]
                return False
            rest.append([length for axis, length in enumerate(inner) if axis != piece.axis])
        if rest[0] != rest[1]:
            return False
        filled += len(move.target.at) * torch.Size(rest[1]).numel()
    return filled == torch.Size(shape).numel()


# --- configs


def _neutral(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """A config whose multipliers do nothing: 1, and the inverse root of a head's width for scores."""
    width = sum(part.size for part in architecture.attentions[0].parts) if architecture.attentions else 1
    usual: dict[str, Any] = {"query_pre_attn_scalar": width, "attention_multiplier": width**-0.5}
    usual["scale_decoder_outputs"] = False
    return {**config, **{key: usual.get(key, 1.0) for key in multipliers_of(config)}}


def _unsaid(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What the base's type takes for granted of settings that its config leaves out and the release's does not."""
    try:
        usual = default_config(str(theirs.get("model_type")))
    except (KeyError, ImportError):  # not a type of transformers, or no transformers
        return {}
    return {key: usual[key] for key in ours.keys() - theirs.keys() if key in usual}


def _vocabulary(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: ours[key] for key in ("vocab_size", "pad_token_id") if key in ours and key in theirs}


# --- the proof


@torch.no_grad()
def _agree(release: TensorSource, found: Transcribed) -> bool:
    """Whether the first blocks of both networks put out the same for the same inputs; one is in memory at a time."""
    nbytes = 4 * sum(release.spec(name).numel for name in release.names if not _is_beyond(name))
    if 2 * nbytes > available_memory():  # the weights are drawn, and then replaced
        return False
    outputs, inputs = [], None
    try:
        for source in (release, found):
            network = _shortened(source)
            inputs = random_inputs(network, 0) if inputs is None else inputs
            outputs.append(main_output(network(**inputs)).double())
            del network
    except Exception:  # ours, and whatever transformers raises over a network that it cannot build or run
        return False
    if outputs[0].shape != outputs[1].shape:
        return False
    gap = torch.linalg.vector_norm(outputs[0] - outputs[1]) / torch.linalg.vector_norm(outputs[0])
    return bool(gap <= AGREEMENT)


def _shortened(source: TensorSource) -> Any:
    """The network of a checkpoint with its first blocks alone."""
    config = dict(source.config)
    depth = next((config[key] for key in _DEPTHS if isinstance(config.get(key), int)), None)
    if depth is not None and depth > BLOCKS:
        for key, value in source.config.items():
            if key in _DEPTHS:
                config[key] = BLOCKS
            elif isinstance(value, list) and len(value) == depth:
                config[key] = value[:BLOCKS]
    network = network_of(config, source.description)
    places = find_places(network)
    held = [name for name in source.names if name in places and not _is_beyond(name)]
    show(places, {name: source.tensor(name).float() for name in held})
    shown = {id(piece.parameter) for name in held for piece in places[name].pieces}
    if any(id(piece.parameter) not in shown for place in places.values() for piece in place.pieces):
        raise BadInput(f"{source.description} does not hold every weight of its network.")
    return network


def _is_beyond(name: str) -> bool:
    number = _NUMBER.search(name)
    return number is not None and int(number[1]) >= BLOCKS
