"""Controls: rewrites that protect nothing, so that an audit which scores them well is wrong.

    identity   theta_d                                  nothing at all
    noise      theta_d + size . rms(theta_d) . N(0, 1)  per tensor: what a loss of utility alone buys
    scale      theta_0 + factor (theta_d - theta_0)     undone by one number

They are protections in form only: ``protect`` refuses them, and `unmergeable methods` marks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.checkpoint.plan import output_like
from unmergeable.protections.base import Inputs, Protection, ProtectionRequirements, Rewrite, shared_tensors
from unmergeable.randomness import Stream

CHUNK_ELEMENTS = 1 << 20


class Control(Protection):
    """A rewrite of one tensor at a time. ``edit`` is the whole of it.

    Tensors that the base lacks or holds in another shape (an output head of another task), and tensors that are not
    floating point, are copied.
    """

    is_control = True
    limits = ""

    def edit(self, expert: Tensor, base: Tensor, stream: Stream) -> Tensor:
        """The tensor that is released in place of ``expert``, in its dtype; ``stream`` belongs to the tensor."""
        raise NotImplementedError

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements()

    def prepare(self, inputs: Inputs) -> Rewrite:
        expert, base, seed = inputs.expert, inputs.base, inputs.seed or 0
        stream = Stream.from_seed(seed).child(f"control.{self.name}")

        def edit(name: str) -> Callable[[Tensor], Tensor]:
            return lambda tensor: self.edit(tensor, base.tensor(name), stream.child(name))

        recipe = {**self.recipe(), "seed": seed}
        return Rewrite(
            source=expert,
            plan=output_like(expert, {name: edit(name) for name in shared_tensors((expert, base))}),
            recipe=recipe,
            resume_token=f"control {recipe}",
            also_read={"base": base},
        )


@dataclass(frozen=True)
class Identity(Control):
    name: ClassVar[str] = "identity"
    summary: ClassVar[str] = "the expert itself"

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements(exact=True)

    def edit(self, expert: Tensor, base: Tensor, stream: Stream) -> Tensor:
        return expert


@dataclass(frozen=True)
class Noise(Control):
    """``size``: standard deviation of the noise, relative to the root mean square of the tensor it is added to."""

    name: ClassVar[str] = "noise"
    summary: ClassVar[str] = "random noise on every tensor"

    size: float = 0.01

    def validate(self) -> None:
        self.require(0 <= self.size <= 10, "size", "lie between 0 and 10")

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
class Scale(Control):
    """``factor``: how much of the task vector is left."""

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "the task vector made shorter"

    factor: float = 0.65

    def validate(self) -> None:
        self.require(0 <= self.factor <= 1, "factor", "lie between 0 and 1")

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements(needs=("base",))

    def edit(self, expert: Tensor, base: Tensor, stream: Stream) -> Tensor:
        start, end = base.double(), expert.double()
        return (start + self.factor * (end - start)).to(expert.dtype)
