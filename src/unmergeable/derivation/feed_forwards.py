"""Proposals for feed-forward blocks: which hidden units a product reads, and which rows make them.

Nothing here has to be right: every proposal is proven or dropped by :mod:`unmergeable.derivation.prove`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from unmergeable.architecture.blocks import FeedForward
from unmergeable.derivation.probe import Source
from unmergeable.derivation.scene import Scene, Unexplained, common_module, laid_out, layer_of


def feed_forward(scene: Scene, index: int, taken: set[str]) -> Iterator[FeedForward]:
    """Proposals for the hidden units that the product ``index`` reads, the one with the largest groups first.

    ``taken``: weights whose columns belong to an attention. Raises Unexplained when these are no hidden units.
    """
    product = scene.trace.products[index]
    places = [scene.column(index, column) for column in range(scene.width(index))]
    if places[0].weight in taken:
        raise Unexplained("read by an attention")
    sources = scene.before(index, layer_of(product.name))
    inputs = Source(product.inputs, outer=product.weight.dim() > 2)
    few = scene.origins(
        Source(product.inputs[..., :1]), sources
    )  # most products read the stream, and are done with here
    origins = scene.origins(inputs, sources) if {len(rows) for rows in few} <= {1, 2} else few
    counts = {len(rows) for rows in origins}
    if len(counts) != 1 or not counts <= {1, 2}:
        raise Unexplained("its input does not come from one or two rows for each coordinate")
    rows = [row for unit in origins for row in unit]
    if len(set(rows)) != len(rows):
        raise Unexplained("its input takes several coordinates from one row")
    order = sorted(range(len(places)), key=lambda unit: places[unit].place)
    down = laid_out([[[places[unit] for unit in order]]])
    sides = [sorted((scene.spot(row) for row in origins[unit]), key=lambda s: (s.weight, s.place)) for unit in order]
    made = [laid_out([[[side[which] for side in sides]]]) for which in range(len(sides[0]))]
    block = FeedForward(common_module(made[0].weight, down.weight), len(order), made[0], down)
    if down.offset:
        raise Unexplained(f"{down.weight} reads more than these units")
    if len(made) == 1:
        yield replace(block, activation="relu")
        yield block
        return
    for gate, up in (made, made[::-1]):
        yield replace(block, gate=gate, up=up)
    yield replace(block, gate=made[0], up=made[1], scale_limit="both factors pass through what is not linear")
