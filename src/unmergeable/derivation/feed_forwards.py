"""Proposals for feed-forward blocks: which hidden units a product reads, and which rows make them.

Nothing here has to be right: every proposal is proven or dropped by :mod:`unmergeable.derivation.prove`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from unmergeable.architecture.blocks import FeedForward
from unmergeable.derivation.probe import Source
from unmergeable.derivation.scene import Scene, Unexplained, common_module, laid_out, layer_of


def feed_forward(scene: Scene, index: int, taken: set[tuple[str, int]]) -> Iterator[FeedForward]:
    """Proposals for the hidden units that the product ``index`` reads, the one with the largest groups first.

    ``taken``: columns that belong to an attention, by weight and place; a product may read both. Raises Unexplained
    when these are no hidden units.
    """
    product = scene.trace.products[index]
    every = [scene.column(index, column) for column in range(scene.width(index))]
    read = [column for column, spot in enumerate(every) if (spot.weight, spot.place) not in taken]
    if not read:
        raise Unexplained("read by an attention")
    places = [every[column] for column in read]
    sources = scene.before(index, layer_of(product.name))
    part = product.inputs if len(read) == len(every) else product.inputs[..., read]
    inputs = Source(part, outer=product.weight.dim() > 2)
    first = scene.origins_of_first(inputs, sources)  # most products read the stream, and are done with here
    origins = scene.origins(inputs, sources) if len(first) in {1, 2} else [first]
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
    is_shared = len(read) < len(every)  # with an attention, which has the name of the module that both lie in
    name = made[0].weight.removesuffix(".weight") if is_shared else common_module(made[0].weight, down.weight)
    if down.slice is not None:
        name = f"{name}.{down.slice}"
    block = FeedForward(name, len(order), made[0], down)
    if down.offset != (read[0] if is_shared else 0):
        raise Unexplained(f"{down.weight} reads more than these units")
    if len(made) == 1:
        yield replace(block, activation="relu")
        yield block
        return
    for gate, up in (made, made[::-1]):
        yield replace(block, gate=gate, up=up)
    yield replace(block, gate=made[0], up=made[1], scale_limit="both factors pass through what is not linear")
