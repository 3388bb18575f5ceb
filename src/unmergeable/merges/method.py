"""What a merge method is: its settings, and a way to turn the operands of one tensor into the merged tensor.

A method works in two steps. ``prepare`` may look at the whole task vectors first (TIES ranks them) and returns the
function that merges one tensor. The engine then calls that function for each tensor, in any order and from any
thread, on operands that lie in files or in memory: a method never knows which.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass
from math import isfinite
from typing import Any, ClassVar, Protocol

from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.progress import Progress, silent


class TensorMerge(Protocol):
    """Merges tensor ``name``; the operands are the base, if the method needs one, and then the experts."""

    def __call__(self, name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor: ...


@dataclass(frozen=True)
class Inputs:
    """The floating-point tensors of all models, by name.

    ``operands(name)`` gives the base, if the method needs one, and then the experts in the order given.
    """

    names: tuple[str, ...]
    operands: Callable[[str], tuple[Operand, ...]]
    threads: int = 1
    progress: Progress = silent

    def total(self, count: Callable[[Sequence[Operand], Scratch], Tensor], *, stage: str) -> Tensor:
        """The sum over all tensors of ``count(operands, scratch)``, an integer tensor: exact in any order."""
        scratch, done, total = Scratch(), 0, None
        sizes = [self._nbytes(name) for name in self.names]
        pool = ThreadPoolExecutor(self.threads)
        try:
            counted = pool.map(lambda name: count(self.operands(name), scratch), self.names)
            for counts, size in zip(counted, sizes, strict=True):
                total = counts if total is None else total.add_(counts)
                done += size
                self.progress(stage, done, sum(sizes), "bytes")
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the tensors not yet begun
        assert total is not None, "models without floating-point tensors are refused"
        return total

    def _nbytes(self, name: str) -> int:
        return sum(operand.numel * operand.dtype.itemsize for operand in self.operands(name))


class Merge(Protocol):
    """A merge method: a frozen dataclass whose fields are its settings, with the published defaults."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    needs_base: ClassVar[bool]
    fewest_experts: ClassVar[int]

    def validate(self) -> None:
        """Raise UsageError when a setting is out of range."""

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """One coefficient per expert, with the method's default where none was given.

        Raises UsageError for values that the method cannot use.
        """

    def prepare(self, inputs: Inputs, coefficients: tuple[float, ...]) -> TensorMerge:
        """Look at the models as a whole, if need be, and return the function that merges one tensor."""


def fill_coefficients(coefficients: Sequence[float | None], default: float) -> tuple[float, ...]:
    """The coefficients with ``default`` for None. Raises UsageError for NaN and infinity."""
    filled = tuple(default if value is None else float(value) for value in coefficients)
    for value in filled:
        if not isfinite(value):
            raise UsageError(f"coefficient {value}: must be a finite number.")
    return filled
