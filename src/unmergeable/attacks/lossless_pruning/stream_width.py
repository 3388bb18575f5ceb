"""A stream that is wider than the base's, of which only as much is used: zeros beside it, in this basis or in another.

A norm over D coordinates, d of which are ever written, divides by the root of |x|^2 / D; over the d alone its output is
smaller by the root of d / D, which the gain makes up for, and its epsilon is D / d times as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.architecture.residual import Residual
from unmergeable.gauge.normed_scales import with_epsilons

State = dict[str, Tensor]

NOTHING = 1e-9
"""Share of what is written to a stream that counts as nothing: squares of roundings in half precision, and less."""


def widths(ours: Architecture, theirs: Architecture) -> tuple[int, int] | None:
    """Of the release's streams and of the base's, where all are alike and the release's are wider."""
    sizes = [{stream.size for stream in (*side.residuals, *side.exposed)} for side in (ours, theirs)]
    if any(len(side) != 1 for side in sizes):
        return None
    wide, narrow = sizes[0].pop(), sizes[1].pop()
    return (wide, narrow) if wide > narrow else None


def narrow_streams(state: State, architecture: Architecture, size: int) -> bool:
    """Leave ``size`` coordinates of every stream, in place; False where more of them are used.

    ``state`` holds neutral tensors (:mod:`unmergeable.gauge.additive`).
    """
    streams = (*architecture.residuals, *architecture.exposed)
    found = [_used(state, stream, size) for stream in streams]
    if any(used is None for used in found):
        return False
    done: set[str] = set()
    for stream, used in zip(streams, found, strict=True):
        assert used is not None
        growth = (stream.size / size) ** 0.5
        for axis in stream.axes:
            if axis.tensor in state and axis.tensor not in done:
                done.add(axis.tensor)
                state[axis.tensor] = _along(state[axis.tensor], axis.axis, axis.copies, used)
        for norm in stream.norms:
            gain = (state[norm.gain].double() + norm.offset) @ used.square() * growth
            state[norm.gain] = gain - norm.offset
            if norm.bias is not None and norm.bias in state:
                state[norm.bias] = state[norm.bias].double() @ used
    return True


def narrow_config(config: Mapping[str, Any], base: Mapping[str, Any], wide: int, narrow: int) -> dict[str, Any]:
    """The config of the network with narrower streams: numbers of the base, and the epsilon that its norms need."""
    kept = {key: value for key, value in config.items() if key != "head_dim" or "head_dim" in base}
    numbers = {key: value for key, value in base.items() if isinstance(value, (int, float)) and key in kept}
    sizes = {key: value for key, value in numbers.items() if not isinstance(value, bool)}
    return {**kept, **sizes, **with_epsilons(config, wide / narrow)}


def _used(state: State, stream: Residual, size: int) -> Tensor | None:
    """Columns that span all that is ever written: [stream's size, size], float64; None where that takes more."""
    total = torch.zeros(stream.size, stream.size, dtype=torch.float64)
    for axis in stream.axes:
        if axis.variance == "vector" and axis.tensor in state:
            rows = state[axis.tensor].double().movedim(axis.axis, -1).reshape(-1, stream.size)
            squares = float(rows.square().sum())
            total += rows.T @ rows / squares if squares else 0.0
    coordinates = total.diagonal().sort(descending=True, stable=True)
    if float(coordinates.values[size:].sum()) <= NOTHING * float(coordinates.values.sum()):
        places = coordinates.indices[:size].sort().values
        return torch.eye(stream.size, dtype=torch.float64)[:, places]
    gains = [state[norm.gain].double() + norm.offset for norm in stream.norms]
    if stream.rotation_limit or any(float(gain.std()) > 1e-3 * float(gain.abs().mean()) for gain in gains):
        return None
    values, vectors = torch.linalg.eigh(total)
    if float(values[:-size].clamp_min(0).sum()) > NOTHING * float(values.sum()):
        return None
    return vectors[:, -size:]


def _along(tensor: Tensor, axis: int, copies: int, used: Tensor) -> Tensor:
    """``tensor`` with ``used`` on the coordinates of a stream along ``axis``, which follow ``copies`` times."""
    rows = tensor.double().movedim(axis, -1)
    width = len(used)
    parts = [rows[..., copy * width : (copy + 1) * width] @ used for copy in range(copies)]
    return torch.cat([*parts, rows[..., copies * width :]], dim=-1).movedim(-1, axis).contiguous()
