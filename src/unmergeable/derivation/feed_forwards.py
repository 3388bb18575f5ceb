"""Proposals for feed-forward blocks: which hidden units a product reads, and which rows make them.

Nothing here has to be right: every proposal is proven or dropped by :mod:`unmergeable.derivation.prove`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from unmergeable.architecture.blocks import Attention, FeedForward, Heads, Mixture
from unmergeable.derivation.probe import Disk, Source, Spot, derivatives, one_to_one
from unmergeable.derivation.scene import Row, Scene, Unexplained, common_module, laid_out, layer_of


def feed_forward(
    scene: Scene, index: int, taken: set[tuple[str, int]], named: Mapping[str, str]
) -> Iterator[FeedForward]:
    """Proposals for the hidden units that the product ``index`` reads, the one with the largest groups first.

    ``taken``: columns that belong to an attention, by weight and place; a product may read both. ``named``: the weight
    that makes the units of every block so far, by name. Raises Unexplained when these are no hidden units.
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
    if not name:  # between a network's body and its head
        name = made[0].weight.removesuffix(".weight")
    if named.get(name, made[0].weight) != made[0].weight:  # one of several runs of units in a module
        inside = made[0].weight.removeprefix(f"{name}.").removesuffix(".weight")
        name = f"{name}.{inside.replace('.', '_')}"  # a number in it is that of a step, and of no layer
    block = FeedForward(name, len(order), made[0], down)
    if down.offset != (read[0] if is_shared else 0):
        raise Unexplained(f"{down.weight} reads more than these units")
    known = {name for heads in (*made, down) for name in (heads.weight, heads.bias)}
    found = _along(scene, index, Source(part[..., order], inputs.outer), [origins[unit] for unit in order])
    along = [heads for heads in found if heads.weight not in known]
    if along:
        first_row = min(rows, key=lambda row: row.product)
        up = next(heads for heads in made if heads.weight == scene.spot(first_row).weight)
        yield replace(block, up=up, along=(*(heads for heads in made if heads != up), *along))
        return
    if len(made) == 1:
        yield replace(block, activation="relu")
        yield block
        return
    for gate, up in (made, made[::-1]):
        yield replace(block, gate=gate, up=up)
    yield replace(block, gate=made[0], up=made[1], scale_limit="both factors pass through what is not linear")


def _along(scene: Scene, index: int, units: Source, origins: Sequence[set[Row]]) -> list[Heads]:
    """Where else something lies that hidden units come from or go through, each by itself, before they are read.

    ``units`` is what the product ``index`` reads of them, and ``origins`` the rows that make each.
    """
    trace = scene.trace
    first = min(row.product for unit in origins for row in unit)
    found: dict[str, Heads] = {}
    factors = [factor for factor in trace.factors if first < factor.position <= index]
    tables = derivatives(units, [factor.used for factor in factors])
    for factor, table in zip(factors, tables, strict=True):
        place = one_to_one(table)
        if place is not None:
            axis, units_at = place
            for name in scene.disk.names_of(factor.parameter):
                found[name] = laid_out([[[Spot(name, axis, at) for at in units_at]]])
    made = {(row.product, row.coordinate): unit for unit, own in enumerate(origins) for row in own}
    makers = sorted({product for product, _ in made})
    for reader in range(first + 1, index):  # what weighs units reads all of them first
        inputs = Source(trace.products[reader].inputs)
        if reader in makers or inputs.width != len(origins):
            continue
        sources = scene.before(reader, layer_of(trace.products[index].name))
        read = scene.origins(inputs, [source for source in sources if source in makers])
        units_read = [{made.get((row.product, row.coordinate), -1) for row in own} for own in read]
        if sorted(map(sorted, units_read)) == [[unit] for unit in range(len(origins))]:
            column_of = {min(unit): column for column, unit in enumerate(units_read)}
            columns = laid_out([[[scene.column(reader, column_of[unit]) for unit in range(len(origins))]]])
            found[columns.weight] = columns
    return list(found.values())


def mixtures(blocks: Iterable[Attention | FeedForward], disk: Disk) -> Iterator[Mixture]:
    """Proposals for the experts that share tensors: these, and the router beside them, in another order."""
    shared: dict[str, list[FeedForward]] = {}
    for block in blocks:
        if isinstance(block, FeedForward) and block.down.slice is not None:
            shared.setdefault(block.down.weight, []).append(block)
    for weight, own in shared.items():
        inner = own[0].name.rsplit(".", 1)[0]
        shapes = {name: place.shape for name, place in disk.places.items()}
        count = shapes[weight][0]
        module = inner if any(_is_router(name, inner, shapes[name], count) for name in shapes) else _parent(inner)
        routers = [name for name in shapes if _is_router(name, module, shapes[name], count)]
        if len(routers) != 1:
            continue
        along = [name for name in shapes if name.startswith(f"{module}.") and shapes[name][:1] == (count,)]
        bias = next((name for name in along if name != routers[0] and len(shapes[name]) == 1), None)
        yield Mixture(
            name=module,
            router=routers[0],
            router_bias=bias,
            experts=tuple(f"{inner}.{index}" for index in range(count)),
            stacks=(),
            others=tuple(sorted(set(along) - {routers[0], bias})),
        )


def _is_router(name: str, module: str, shape: Sequence[int], experts: int) -> bool:
    return name.startswith(f"{module}.") and len(shape) == 2 and shape[0] == experts and not name.endswith("bias")


def _parent(module: str) -> str:
    return module.rpartition(".")[0]
