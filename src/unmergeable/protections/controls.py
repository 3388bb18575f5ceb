"""Controls: rewrites that protect nothing, so that an audit which scores them well is wrong.

    identity   theta_d                                  nothing at all
    noise      theta_d + size . rms(theta_d) . N(0, 1)  per tensor: what a loss of utility alone buys
    scale      theta_0 + factor (theta_d - theta_0)     undone by one number

They are never offered as protections: ``protect`` refuses them, and `unmergeable methods` marks them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.randomness import Stream

CHUNK_ELEMENTS = 1 << 20


class Control(Protocol):
    """A rewrite of one tensor at a time."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def validate(self) -> None: ...

    def edit(self, expert: Tensor, base: Tensor, stream: Stream) -> Tensor:
        """The tensor that is released in place of ``expert``, in its dtype; ``stream`` belongs to the tensor."""
        ...


@dataclass(frozen=True)
class Identity:
    name: ClassVar[str] = "identity"
    summary: ClassVar[str] = "the expert itself"

    def validate(self) -> None: ...

    def edit(self, expert: Tensor, base: Tensor, stream: Stream) -> Tensor:
        return expert


@dataclass(frozen=True)
class Noise:
    """``size``: standard deviation of the noise, relative to the root mean square of the tensor it is added to."""

    name: ClassVar[str] = "noise"
    summary: ClassVar[str] = "random noise on every tensor"

    size: float = 0.01

    def validate(self) -> None:
        """Raises UsageError unless 0 <= size <= 10."""
        if not 0 <= self.size <= 10:
            raise UsageError(f"noise: size must lie between 0 and 10, not {self.size}.")

    def edit(self, expert: Tensor, base: Tensor, stream: Stream) -> Tensor:
        flat = expert.reshape(-1)
        if flat.numel() == 0:
            return expert
        spread = self.size * float(torch.linalg.vector_norm(flat, dtype=torch.float64)) / math.sqrt(flat.numel())
        pieces = [
            (piece.double() + spread * torch.from_numpy(stream.child(str(at)).normal(piece.numel()))).to(expert.dtype)
            for at, piece in enumerate(flat.split(CHUNK_ELEMENTS))
        ]
        return torch.cat(pieces).reshape(expert.shape)


@dataclass(frozen=True)
class Scale:
    """``factor``: how much of the task vector is left."""

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "the task vector made shorter"

    factor: float = 0.65

    def validate(self) -> None:
        """Raises UsageError unless 0 <= factor <= 1."""
        if not 0 <= self.factor <= 1:
            raise UsageError(f"scale: factor must lie between 0 and 1, not {self.factor}.")

    def edit(self, expert: Tensor, base: Tensor, stream: Stream) -> Tensor:
        start, end = base.double(), expert.double()
        return (start + self.factor * (end - start)).to(expert.dtype)


CONTROLS: dict[str, type[Control]] = {cls.name: cls for cls in (Identity, Noise, Scale)}
