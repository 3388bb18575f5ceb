"""A checkpoint under a gauge, as a plan for the loop that writes it: what is edited, and what takes another's place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from unmergeable.architecture import SymmetryMap
from unmergeable.checkpoint.plan import OutputTensor, output_like
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.act import edits, origins
from unmergeable.gauge.gauge import Gauge


def transformed(
    source: TensorSource,
    symmetry: SymmetryMap,
    gauges: Sequence[Gauge],
    *,
    drop: Collection[str] = (),
    extra: Sequence[OutputTensor] = (),
) -> tuple[OutputTensor, ...]:
    """The tensors of ``source`` under ``gauges`` applied left to right, with its names, shards and order.

    ``drop`` and ``extra`` as in :func:`~unmergeable.checkpoint.plan.output_like`; ``extra`` is taken as it is.
    """
    edit = {name: function for name, function in edits(symmetry, gauges).items() if name in source.index.entries}
    places = origins(symmetry, gauges)
    return tuple(
        replace(tensor, origin=places[tensor.name], spec=source.spec(places[tensor.name]))
        if tensor.name in places
        else tensor
        for tensor in output_like(source, edit, drop=drop, extra=extra)
    )
