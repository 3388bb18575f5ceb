"""What a merge method is: its settings, and a way to turn the operands of one tensor into the merged tensor.

A method that looks at one tensor at a time defines ``merge_one``. Another (TIES ranks whole task vectors) defines
``prepare``, which looks at the models and returns the function that merges one tensor. The engine calls it for each
tensor, in any order and from any thread, on operands that lie in files or in memory: a method never knows which.

Coefficients, and the settings a method names in ``varies``, may differ from tensor to tensor. The
:class:`Terms` of a tensor say what holds for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.blocks import Operand, Scratch
from unmergeable.progress import Progress, silent
from unmergeable.registry import Requirements

if TYPE_CHECKING:
    from unmergeable.merges.learning import LearningInputs, LearntMerge


class TensorMerge(Protocol):
    """Merges tensor ``name``; the operands are the base, if the method needs one, and then the experts."""

    def __call__(self, name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor: ...


@dataclass(frozen=True)
class Terms:
    """What holds for one tensor: a coefficient per expert, and the settings that depart from the method's own.

    ``varied`` maps a setting to one value per expert, all equal where the setting belongs to the merge.
    """

    coefficients: tuple[float, ...]
    varied: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def per_expert(self, setting: str, default: float) -> tuple[float, ...]:
        """The values of ``setting``, ``default`` being the method's own."""
        return self.varied.get(setting, (default,) * len(self.coefficients))

    def of_tensor(self, setting: str, default: float) -> float:
        """The value of a setting that all experts share."""
        return self.varied[setting][0] if setting in self.varied else default


TermsOf = Callable[[str], Terms]
"""The terms of a tensor, by its name."""


@dataclass(frozen=True)
class Inputs:
    """The floating-point tensors of all models, by name.

    ``operands(name)`` gives the base, if the method needs one, and then the experts in the order given.
    ``statistics`` are those of each expert, by name, where they are given in memory.
    """

    names: tuple[str, ...]
    operands: Callable[[str], tuple[Operand, ...]]
    statistics: tuple[Mapping[str, Operand], ...] = ()
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


Varies = Mapping[str, Literal["expert", "tensor"]]
"""Settings that may differ from tensor to tensor: whether each belongs to an expert (as a density does) or to the
merge (as a scaling coefficient does)."""


@dataclass(frozen=True)
class Merge:
    """A merge method: a frozen dataclass whose fields are its settings, with the published defaults.

    A method of another package derives from this class; what is declared here holds unless it says otherwise.
    """

    name: ClassVar[str]
    """What the method is called by, on the command line as in Python."""
    fewest_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = None
    varies: ClassVar[Varies] = {}
    needs_positive: ClassVar[bool] = False
    """Whether a negative coefficient is refused, since it would vote against its own expert; not all may be 0."""

    def requirements(self) -> Requirements:
        """What the method needs with these settings: the base of the experts ("base"), examples ("data")."""
        return Requirements(needs=("base",))

    @property
    def needs_base(self) -> bool:
        return "base" in self.requirements().needs

    @property
    def needs_data(self) -> bool:
        return "data" in self.requirements().needs

    def validate(self) -> None:
        """Raise UsageError when a setting is out of range; here, for a choice that does not exist."""
        for setting, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, setting) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise UsageError(f"{setting}={getattr(self, setting)}: must be one of {choices}.")

    def require_count(self, experts: int) -> None:
        """Raise UsageError for fewer experts than the method can use, or for more."""
        if experts < self.fewest_experts:
            raise UsageError(
                f"{self.name}: {experts} experts given, at least {self.fewest_experts} needed; name another."
            )
        if self.most_experts is not None and experts > self.most_experts:
            raise UsageError(f"{self.name}: {experts} experts given, at most {self.most_experts} can be merged.")

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """One coefficient per expert, with the method's default where none was given.

        Raises UsageError for values that the method cannot use.
        """
        filled = fill_coefficients(coefficients, default=1.0)
        if self.needs_positive and (min(filled) < 0 or max(filled) == 0):
            raise UsageError(
                f"{self.name}: coefficients {filled} must be positive (0 leaves an expert out, but not all)."
            )
        return filled

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        """Look at the models as a whole, if need be, and return the function that merges one tensor."""
        return lambda name, operands, scratch: self.merge_one(name, operands, scratch, terms(name))

    def merge_one(self, name: str, operands: Sequence[Operand], scratch: Scratch, terms: Terms) -> Tensor:
        """Merge one tensor: what a method defines that looks at one tensor at a time, instead of ``prepare``."""
        raise UsageError(f"{self.name} cannot merge: its class defines neither merge_one nor prepare.")

    def learn(self, inputs: LearningInputs) -> AbstractContextManager[LearntMerge]:
        """Turn data into what the merge is written with: statistics, coefficients, a choice of experts.

        Only methods that read data have anything to do here. Files made on the way last as long as the context.
        """
        raise UsageError(f"{self.name} merges without data; leave out --data.")


def fill_coefficients(coefficients: Sequence[float | None], default: float) -> tuple[float, ...]:
    """The coefficients with ``default`` for None. Raises UsageError for NaN and infinity."""
    filled = tuple(default if value is None else float(value) for value in coefficients)
    for value in filled:
        if not isfinite(value):
            raise UsageError(f"coefficient {value}: must be a finite number.")
    return filled


def require_finite(setting: str, value: float) -> None:
    """Raise UsageError for NaN and infinity."""
    if not isfinite(value):
        raise UsageError(f"{setting}={value}: must be a finite number.")


def require_density(density: float) -> None:
    """Raise UsageError unless ``density`` is a fraction of weights that can be kept."""
    if not 0 < density <= 1:
        raise UsageError(f"density={density}: must lie in (0, 1], the fraction of weights kept.")
