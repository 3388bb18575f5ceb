"""Hidden units that were turned round, with others that make up for it: which they were, from what the block computes.

Every activation here has act(u) = u / 2 + e(u) with e even, so that a unit with input weights w and outputs v adds

    v act(w x) = v e(w x) + 1/2 v (w x)                     of a gated block  v e(g x) (h x) + 1/2 v (g x) (h x)

The first part does not see the sign of w (of g); the second is linear (quadratic) in x, and all units share it. So
units of opposite signs count as one that puts out the sum of both, and those whose sum is zero add to the second part
alone. Of the units that are left the signs s are those with which they make up the second part of all,

    sum_i s_i v_i (w_i x) = sum_j v_j (w_j x)               i: units left, j: all units

least squares in s, whose normal equations are as many as there are units, whatever the width of the stream.

A bias may keep a unit from ever bending: far below zero it puts out nothing, far above what it reads, and counts as
twice the second part and none of the first. How far is far, the biases
of the base's own units say, and of as many here as the base has: the scale of what they read may be another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmergeable.architecture.blocks import FeedForward, Heads, output_bias

State = dict[str, Tensor]

SAME = 1e-3
"""How far from 1 the likeness of two units may be that read the same."""

NOTHING = 1e-5
"""Size of what a unit puts out, relative to the block's median unit, that counts as nothing."""

FAR = 4.0
"""Times the largest bias of the base's units, in units of their input weights, that nothing a unit reads outweighs."""

UNEXPLAINED = 0.05
"""Of the second part, what signs may leave: rounding in half precision, of a thousand units fewer than one sign."""


def can_turn(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether act(u) - act(-u) = u, to rounding."""
    places = torch.linspace(0, 8, 65, dtype=torch.float64)
    return bool(torch.allclose(activation(places) - activation(-places), places, atol=1e-9))


def largest_bias(state: State, block: FeedForward, size: int | None = None) -> float:
    """Of the units of a block without a gate, or of the ``size`` with the smallest, in units of their input weights."""
    rows = _rows(state, block.up)
    lengths = rows[:, :-1].norm(dim=1)
    reads = lengths > NOTHING * lengths.max()
    biases = torch.where(reads, rows[:, -1].abs() / lengths.clamp_min(1e-300), math.inf).sort().values
    return float(biases[: int(reads.sum()) if size is None else size].amax()) if bool(reads.any()) else math.inf


def far(state: State, block: FeedForward, size: int, usual: float) -> float:
    """Biases beyond it keep a unit from bending: farther than those of the base's units, and than so many here."""
    is_scaled = block.gate is None and block.up.bias is not None
    return FAR * max(usual, largest_bias(state, block, size)) if is_scaled and math.isfinite(usual) else math.inf


def turn_units_back(state: State, own: State, block: FeedForward, size: int, usual: float = math.inf) -> bool:
    """Leave ``size`` hidden units of a block that compute what all of them do, in place; False where there are none.

    Args:
        state: neutral tensors of the release.
        own: the same as the release has them.
        block: whose activation :func:`can_turn`.
        size: hidden units of the base.
        usual: their :func:`largest_bias`.
    """
    units = _Units.of(state, block).saturated(far(state, block, size, usual))
    leaders, scales = _leaders(units, block)
    outputs = units.led_by(leaders, scales)
    amount = outputs.norm(dim=1) * units.beside.norm(dim=1)
    order = amount.argsort(descending=True, stable=True)
    kept, rest = order[:size].sort().values, order[size:]
    if float(amount[rest].max()) > NOTHING * float(amount[kept].median()):
        return False
    signs = _signs(units, outputs, kept)
    if signs is None:
        return False
    for side in (state, own):
        own_units = replace(_Units.of(side, block), slopes=units.slopes)
        _leave(side, block, own_units, own_units.led_by(leaders, scales), kept, signs)
    return True


@dataclass(frozen=True)
class _Units:
    """Hidden units of a block, float64, [units, inputs] and [units, outputs].

    Attributes:
        turned: the input weights whose sign the even part does not see.
        other: of a gated block what the gate is multiplied by, with biases as one more input; None of others.
        down: what units put out.
        slopes: of units that never bend 0 or 2, of others 1.
    """

    turned: Tensor
    other: Tensor | None
    down: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, state: State, block: FeedForward) -> _Units:
        reading = block.up if block.gate is None else block.gate
        other = None if block.gate is None else _rows(state, block.up)
        down = state[block.down.weight].movedim(block.down.axis, 0).double()
        return cls(_rows(state, reading), other, down, down.new_ones(len(down)))

    def saturated(self, least: float) -> _Units:
        """With the slopes of units whose bias is beyond ``least``, in units of their input weights."""
        if self.other is not None or not math.isfinite(least):
            return self
        reach = least * self.turned[:, :-1].norm(dim=1)
        bias = self.turned[:, -1]
        return replace(self, slopes=torch.where(bias.abs() > reach, 1 + bias.sign(), 1.0).double())

    @property
    def beside(self) -> Tensor:
        """Input weights that a unit's output grows with."""
        return self.turned if self.other is None else self.other

    def led_by(self, leaders: Tensor, scales: Tensor) -> Tensor:
        """What units put out together with those that are led by them; of others zero."""
        bends = (self.slopes == 1).double()
        return torch.zeros_like(self.down).index_add(0, leaders, (bends * scales)[:, None] * self.down)

    @property
    def seconds(self) -> Tensor:
        """What units put out, as it counts in the second part."""
        return self.slopes[:, None] * self.down

    def second_parts(self, rows: Tensor) -> Tensor:
        """Scalar products of what units multiply their outputs by in the second part, [rows, units].

        Without a gate constants are left out, which an output bias may take over.
        """
        if self.other is None:
            inputs = self.turned[:, :-1]
            return inputs[rows] @ inputs.T
        straight = (self.turned[rows] @ self.turned.T) * (self.other[rows] @ self.other.T)
        crossed = (self.turned[rows] @ self.other.T) * (self.other[rows] @ self.turned.T)
        return (straight + crossed) / 2


def _rows(state: State, heads: Heads) -> Tensor:
    weight = state[heads.weight].movedim(heads.axis, 0).double()
    bias = weight.new_zeros(len(weight)) if heads.bias is None else state[heads.bias].double()
    return torch.cat([weight, bias[:, None]], dim=1)


def _leaders(units: _Units, block: FeedForward) -> tuple[Tensor, Tensor]:
    """For each unit the first that reads the same up to a sign, int64 [units], and how many times as much it reads."""
    scales = torch.ones(len(units.down), dtype=torch.float64)
    turned, other = units.turned, units.other
    if other is None and block.activation == "relu":
        scales = turned.norm(dim=1).clamp_min(1e-300)
        turned = turned / scales[:, None]
    alike = _likeness(turned).abs() > 1 - SAME
    if other is not None:
        if not block.scale_limit:
            largest = other.gather(1, other.abs().argmax(1, keepdim=True))[:, 0]
            scales = other.norm(dim=1).clamp_min(1e-300) * torch.where(largest < 0, -1.0, 1.0)
            other = other / scales[:, None]
        alike &= _likeness(other) > 1 - SAME
    alike.fill_diagonal_(fill_value=True)
    leaders = alike.to(torch.uint8).argmax(dim=1)
    return leaders, scales / scales[leaders]


def _likeness(rows: Tensor) -> Tensor:
    """1 - |x - y|^2 / (|x|^2 + |y|^2): the lengths count as well."""
    squares = rows.square().sum(1)
    return 2 * (rows @ rows.T) / (squares[:, None] + squares[None]).clamp_min(1e-300)


def _signs(units: _Units, outputs: Tensor, kept: Tensor) -> Tensor | None:
    """Of the units ``kept``, 1 or -1 each, with ``outputs`` of all; None where no signs explain the second part."""
    parts = units.second_parts(kept)
    of_all = (parts * (outputs[kept] @ units.seconds.T)).sum(1)
    matrix = parts[:, kept] * (outputs[kept] @ outputs[kept].T)
    diagonal = matrix.diagonal()
    does = diagonal > NOTHING**2 * diagonal.median()
    solved = torch.linalg.solve(matrix + torch.diag(1e-12 * diagonal + 1e-300), of_all)
    signs = torch.where(does & (solved < 0), -1.0, 1.0).double()
    every = torch.arange(len(units.down))
    total = sum(
        float((units.second_parts(rows) * (units.seconds[rows] @ units.seconds.T)).sum()) for rows in every.split(1024)
    )
    left = float(signs @ matrix @ signs - 2 * signs @ of_all) + total
    is_clear = bool(((solved.abs() - 1).abs()[does] < 0.5).all())
    return signs if is_clear and left <= UNEXPLAINED**2 * max(total, 0.0) else None


def _leave(side: State, block: FeedForward, before: _Units, outputs: Tensor, kept: Tensor, signs: Tensor) -> None:
    """The units ``kept`` with these signs and outputs; a constant that they put out less goes into the output bias."""
    reading = block.up if block.gate is None else block.gate
    bias = output_bias(block)
    if block.gate is None and reading.bias is not None and bias in side:
        lacks = before.turned[:, -1] @ before.seconds - (signs * before.turned[kept, -1]) @ outputs[kept]
        side[bias] = (side[bias].double() + lacks / 2).to(side[bias].dtype)
    weight = side[reading.weight].movedim(reading.axis, 0)[kept]
    side[reading.weight] = (weight * signs.to(weight.dtype)[:, None]).movedim(0, reading.axis).contiguous()
    if reading.bias is not None:
        side[reading.bias] = side[reading.bias][kept] * signs.to(side[reading.bias].dtype)
    if block.gate is not None:
        side[block.up.weight] = side[block.up.weight].index_select(block.up.axis, kept).contiguous()
        if block.up.bias is not None:
            side[block.up.bias] = side[block.up.bias][kept]
    dtype = side[block.down.weight].dtype
    side[block.down.weight] = outputs[kept].movedim(0, block.down.axis).to(dtype).contiguous()
