"""Exact rewrites of weights at random, inside the network's own structure: trades, changes of basis, extreme scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from unmergeable.architecture import Architecture
from unmergeable.attacks.canonicalise import SCALABLE
from unmergeable.attacks.reading import GaugedSource, Reader
from unmergeable.checkpoint.source import TensorSource
from unmergeable.evaluation.planted.drawn import TRADES, Drawn
from unmergeable.gauge.additive import Neutral, freedoms_of
from unmergeable.gauge.config_scales import multipliers_of, with_config
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import fixed_gauge
from unmergeable.gauge.home import Home
from unmergeable.gauge.normed_scales import epsilons_of, normed_scales, rescaled, with_epsilons
from unmergeable.protections.exact import Weights
from unmergeable.protections.gauge import LargestGauge
from unmergeable.randomness import Stream

POWERS = {"F16": (6, 10), "F32": (60, 100), "BF16": (60, 100), "F64": (60, 100)}
"""By stored dtype, the exponents of two that an extreme scale is drawn between: queries by 2^100, keys by 2^-100."""


def traded(
    source: TensorSource, architecture: Architecture, stream: Stream, kinds: Iterable[str]
) -> tuple[TensorSource, tuple[str, ...]]:
    """Constants, gains and scales of these kinds drawn, and moved between tensors; and the kinds that there are."""
    freedoms = freedoms_of(architecture, source.names)
    names = {kind: {name for name in TRADES[kind](freedoms) if name is not None} for kind in kinds}
    done = tuple(kind for kind, of_kind in names.items() if of_kind)
    if not done:
        return source, ()
    drawn = Drawn(source, freedoms, stream, frozenset().union(*names.values()))
    return Home(source, freedoms, drawn, Neutral(source, freedoms).tensor), done


def turned(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every basis drawn from the largest group there is."""
    gauges = LargestGauge().gauges(architecture, stream, Weights(source))
    return GaugedSource(source, Reader(source, architecture.symmetry).under(*gauges))


def stretched(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Queries, values and hidden units by extreme powers of two, keys and outputs by their inverses.

    None where norms or activations leave no such scale, or the weights are in a dtype that does not hold any.
    """
    dtypes = {source.spec(name).dtype for name in architecture.symmetry.legs if name in source.index.entries}
    if not dtypes <= POWERS.keys():
        return None
    least, most = (min(POWERS[dtype][side] for dtype in dtypes) for side in range(2))
    elements: dict[str, Element] = {}
    for name, space in architecture.symmetry.select("query_key", "value_output", "feed_forward").items():
        if space.group.kind in SCALABLE:
            drawn = stream.child(name)
            sizes = least + (most - least) * torch.from_numpy(drawn.child("size").uniform(space.blocks, 1))
            powers = (sizes * torch.from_numpy(drawn.child("sign").signs(space.blocks, 1))).round()
            order = torch.arange(space.size).expand(space.blocks, -1).clone()
            elements[name] = Monomial(order, (2.0**powers).expand(-1, space.size).clone())
    if not elements:
        return None
    gauge = fixed_gauge(architecture.symmetry.spaces, elements)
    return GaugedSource(source, Reader(source, architecture.symmetry).under(gauge))


def streams_scaled(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every stream, and all else that a norm reads, times a power of two, and every epsilon times its square.

    None where the config does not name the epsilon, or a norm reads a latent.
    """
    scales = normed_scales(architecture, source)
    if not scales or not epsilons_of(source.config) or any(block.latents for block in architecture.attentions):
        return None
    factor = 2.0 ** (3 + round(3 * float(stream.uniform(1)[0])))
    scaled = rescaled(source, scales, [factor] * len(scales), with_epsilons(source.config, factor**2))
    projections = {
        name
        for block in architecture.attentions
        for part in block.parts
        for heads in (part.query, part.key)
        for name in (heads.weight, heads.bias)
        if block.norm is not None and name is not None
    }
    fused = {block.value.weight for block in architecture.attentions} & projections
    if fused:
        return None
    queries_and_keys = {name: scaled.factors.get(name, 1.0) * factor for name in projections}
    return replace(scaled, factors={**scaled.factors, **queries_and_keys})


def config_scaled(source: TensorSource, architecture: Architecture, stream: Stream) -> TensorSource | None:
    """Every number that the config multiplies by, times a power of four, and weights that make up for it; None where
    there is none whose weights stand by themselves.
    """
    wanted = dict(source.config)
    for key in multipliers_of(source.config):
        if isinstance(value := source.config.get(key), bool):
            wanted[key] = not value
        elif value is not None:
            wanted[key] = value * 4 ** (1 + int(3 * stream.child(key).uniform(1)[0]))
    return with_config(source, architecture, wanted)
