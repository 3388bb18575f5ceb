"""mergekit's methods: the parameters they take, and which merge of this package does the same.

Where mergekit departs from a paper, its variant is named here once: trimming per tensor, rescaling to the L1 norm, a
floor under norms, its own defaults. ``docs/merging.md`` shows the same as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from unmergeable.merges.base import Merge
from unmergeable.merges.breadcrumbs import Breadcrumbs
from unmergeable.merges.dare_linear import DareLinear
from unmergeable.merges.dare_ties import DareTies
from unmergeable.merges.della import Della
from unmergeable.merges.election import Average
from unmergeable.merges.linear import Linear
from unmergeable.merges.model_stock import ModelStock
from unmergeable.merges.slerp import Slerp
from unmergeable.merges.task_arithmetic import TaskArithmetic
from unmergeable.merges.thinning import Rescale
from unmergeable.merges.ties import Ties
from unmergeable.merges.variation import Variation

Switches = Mapping[str, bool]
"""Parameters that hold for the whole merge, by name."""


class Numbers(Protocol):
    """The parameters of one tensor that are numbers. Without a default a parameter is required."""

    def of_tensor(self, parameter: str, default: float | None = None) -> float:
        """One that all experts share."""

    def per_expert(self, parameter: str, default: float | None = None) -> tuple[float, ...]:
        """One of each expert."""


@dataclass(frozen=True)
class MergekitMethod:
    """A method of mergekit: its parameters, the merge that does the same, and how its numbers translate.

    Numbers may vary from tensor to tensor; those of the merge are shared by all experts. Switches (with mergekit's
    defaults) hold throughout.
    """

    of_experts: tuple[str, ...]
    of_merge: tuple[str, ...]
    switches: Switches
    method: Callable[[Switches], Merge]
    terms: Callable[[Numbers, Switches], Variation]


def _averaged(look: Numbers, on: Switches) -> Variation:
    return Variation(look.per_expert("weight"))


def _turned(look: Numbers, on: Switches) -> Variation:
    return Variation(settings={"t": look.of_tensor("t")})


def _untouched(look: Numbers, on: Switches) -> Variation:
    return Variation()


def _added(**defaults: float) -> Callable[[Numbers, Switches], Variation]:
    """Terms of a weighted sum of task vectors; ``defaults`` are the further numbers of each expert."""

    def terms(look: Numbers, on: Switches) -> Variation:
        weights, factor = look.per_expert("weight"), look.of_tensor("lambda", 1.0)
        if on["normalize"] and abs(sum(weights)) >= _SMALLEST_SUM:
            factor /= sum(weights)
        return Variation(
            tuple(factor * weight for weight in weights),
            {number: look.per_expert(number, default) for number, default in defaults.items()},
        )

    return terms


def _elected(**defaults: float) -> Callable[[Numbers, Switches], Variation]:
    """The same where signs are elected: the factor belongs to the merged task vector."""

    def terms(look: Numbers, on: Switches) -> Variation:
        settings: dict[str, float | tuple[float, ...]] = {
            number: look.per_expert(number, default) for number, default in defaults.items()
        }
        return Variation(look.per_expert("weight"), {**settings, "scaling_coefficient": look.of_tensor("lambda", 1.0)})

    return terms


def _average(on: Switches) -> Average:
    return "weight" if on["normalize"] else "sum"


def _rescale(on: Switches) -> Rescale:
    return "norm" if on["rescale"] else "none"


_SMALLEST_SUM = 1e-8
"""mergekit does not divide by a smaller sum of weights."""

METHODS: dict[str, MergekitMethod] = {
    "linear": MergekitMethod(
        ("weight",), (), {"normalize": True}, lambda on: Linear(normalize=on["normalize"]), _averaged
    ),
    "slerp": MergekitMethod((), ("t",), {}, lambda on: Slerp(), _turned),
    "task_arithmetic": MergekitMethod(
        ("weight",), ("lambda",), {"normalize": False}, lambda on: TaskArithmetic(), _added()
    ),
    "ties": MergekitMethod(
        ("weight", "density"),
        ("lambda",),
        {"normalize": True},
        lambda on: Ties(trim="tensor", average=_average(on), undecided="positive"),
        _elected(density=1.0),
    ),
    "dare_linear": MergekitMethod(
        ("weight", "density"),
        ("lambda",),
        {"normalize": False, "rescale": True},
        lambda on: DareLinear(rescale=_rescale(on)),
        _added(density=1.0),
    ),
    "dare_ties": MergekitMethod(
        ("weight", "density"),
        ("lambda",),
        {"normalize": False, "rescale": True},
        lambda on: DareTies(rescale=_rescale(on), average=_average(on), undecided="positive"),
        _elected(density=1.0),
    ),
    "della": MergekitMethod(
        ("weight", "density", "epsilon"),
        ("lambda",),
        {"normalize": True, "rescale": True},
        lambda on: Della(rescale=_rescale(on), average=_average(on), undecided="positive"),
        _elected(density=1.0, epsilon=0.15),
    ),
    "breadcrumbs": MergekitMethod(
        ("weight", "density", "gamma"),
        ("lambda",),
        {"normalize": False},
        lambda on: Breadcrumbs(),
        _added(density=1.0, gamma=0.01),
    ),
    "model_stock": MergekitMethod(
        (),
        (),
        {"filter_wise": False},
        lambda on: ModelStock(filter_wise=on["filter_wise"], smallest_norms=1e-6),
        _untouched,
    ),
}
