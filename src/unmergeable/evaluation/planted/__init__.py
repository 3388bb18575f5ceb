"""Releases that protect nothing, made at random: exact rewrites of a checkpoint of every kind that is known.

Whatever they do to the weights, the network computes what it computed before. An attacker who is worth the name undoes
them; an audit in which a planted release stays unmergeable is no audit.

    structure   idle_layer, split_layer, wider_feed_forwards, turned_units, saturated_units, more_heads,
                split_heads, wider_heads, untied                                ``config.json`` says so
    trades      value_bias, key_bias, norm_bias, norm_gain, layer_scale, unseen_reading, unseen_writing, router,
                summed_rows, position_bias
                between tensors: :mod:`unmergeable.gauge.additive`
    gauge       every basis that the network cannot see          (:mod:`unmergeable.protections.gauge`)
    scales      queries and values by powers of two near 2^100 against keys and outputs
    config      numbers that the config multiplies by, against weights (:mod:`unmergeable.gauge.config_scales`)
    streams     all that a norm reads times a power of two, its epsilon with it (:mod:`unmergeable.gauge.normed_scales`)

Each is drawn from the seed alone. What a family does not have is left out; the result says what was done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unmergeable.architecture import Architecture, detect
from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.source import TensorSource
from unmergeable.evaluation.planted.drawn import TRADES
from unmergeable.evaluation.planted.heads import more_heads, split_heads, wider_heads
from unmergeable.evaluation.planted.layers import idle_layer, split_layer
from unmergeable.evaluation.planted.trades import config_scaled, streams_scaled, stretched, traded, turned
from unmergeable.evaluation.planted.widths import saturated_units, turned_units, wider_feed_forwards
from unmergeable.protections.untied import untied
from unmergeable.randomness import Stream

Plant = Callable[[TensorSource, Architecture, Stream], TensorSource | None]
"""A rewrite drawn from a stream; None where the architecture has none of its kind."""


def untie(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """The output head apart from the embedding it was tied to."""
    streams = architecture.residuals
    is_of_use = any(item.tied is not None and item.kind == "rms" for item in streams) and architecture.family != "t5"
    return untied(source, architecture)[0] if is_of_use and OUTPUT_HEAD not in source.names else None


STRUCTURES: Mapping[str, Plant] = {
    "idle_layer": idle_layer,
    "split_layer": split_layer,
    "wider_feed_forwards": wider_feed_forwards,
    "more_heads": more_heads,
    "split_heads": split_heads,
    "wider_heads": wider_heads,
    "turned_units": turned_units,
    "saturated_units": saturated_units,
    "untied": untie,
}
"""Rewrites that change ``config.json``."""

BASES: Mapping[str, Plant] = {"gauge": turned, "scales": stretched, "streams": streams_scaled, "config": config_scaled}
"""Changes of basis and of scale. ``config.json`` says the epsilon of the third, and the numbers of the last."""

KINDS: tuple[str, ...] = (*STRUCTURES, *TRADES, *BASES)
"""Every kind, in the order in which they are applied."""


@dataclass(frozen=True)
class Planted:
    """The same network in other weights, in memory, and the kinds of rewrites that made it."""

    source: MemorySource
    kinds: tuple[str, ...]


def planted(source: TensorSource, architecture: Architecture, seed: int, kinds: Sequence[str] = KINDS) -> Planted:
    """An exact rewrite of ``source`` by all of ``kinds`` that its family has, drawn from ``seed``.

    Tensors are computed in float64 and rounded once to the dtype they were stored in (copies of what a structure adds:
    twice). ``config`` of the result is what its ``config.json`` has to say.

    Raises:
        BadInput: a norm gain is zero or not finite, so that the stream cannot be rotated.
    """
    stream = Stream.from_seed(seed).child("planted")
    done: list[str] = []
    current: TensorSource = source
    for kind, plant in STRUCTURES.items():
        made = plant(current, architecture, stream.child(kind)) if kind in kinds else None
        if made is not None:
            done.append(kind)
            current = made
            architecture = detect(made.config, {name: made.spec(name).shape for name in made.names})
    current, trades = traded(current, architecture, stream.child("trades"), [kind for kind in TRADES if kind in kinds])
    done += trades
    for kind, plant in BASES.items():
        made = plant(current, architecture, stream.child(kind)) if kind in kinds else None
        if made is not None:
            done.append(kind)
            current = made
    tensors = {
        name: current.tensor(name).to(torch_dtype(current.spec(name).dtype)).contiguous() for name in current.names
    }
    return Planted(MemorySource(tensors, current.config, source.folder), tuple(done))
