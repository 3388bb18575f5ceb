"""mergekit's methods: the parameters they take, and which merge of this package does the same.

Where mergekit departs from a paper, its variant is named here once: trimming per tensor, rescaling to the L1 norm, a
floor under norms, its own defaults. ``docs/merging.md`` shows the same as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from unmergeable.merges.arcee_fusion import ArceeFusion
from unmergeable.merges.base import Merge
from unmergeable.merges.breadcrumbs import Breadcrumbs
from unmergeable.merges.breadcrumbs_ties import BreadcrumbsTies
from unmergeable.merges.dare_linear import DareLinear
from unmergeable.merges.dare_ties import DareTies
from unmergeable.merges.della import Della
from unmergeable.merges.della_linear import DellaLinear
from unmergeable.merges.election import Average
from unmergeable.merges.karcher import Karcher
from unmergeable.merges.linear import Linear
from unmergeable.merges.model_stock import ModelStock
from unmergeable.merges.multislerp import MultiSlerp
from unmergeable.merges.nearswap import NearSwap
from unmergeable.merges.nuslerp import Along, NuSlerp
from unmergeable.merges.ram import Ram
from unmergeable.merges.sce import Sce
from unmergeable.merges.slerp import Slerp
from unmergeable.merges.sphere import Origin
from unmergeable.merges.task_arithmetic import TaskArithmetic
from unmergeable.merges.thinning import Rescale
from unmergeable.merges.ties import Ties
from unmergeable.merges.variation import Variation

Switches = Mapping[str, bool]
"""Parameters that hold for the whole merge, by name."""

Role = Literal["origin", "centre", "expert", "first"]
"""What ``base_model`` is: what task vectors start from, which must be named; the centre of a sphere, where it is named;
a model like the others, where it is named; the first of two models, which must be named."""


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

    Attributes:
        of_experts, of_merge: names of its numbers.
        method: the merge, from the switches and whether a base is named.
        terms: what its numbers mean for one tensor.
        base: what the base is to it.
        most: models beside the base, at most.
        fills_up: whether slices may hold different numbers of models, since one without weight changes nothing.
    """

    of_experts: tuple[str, ...]
    of_merge: tuple[str, ...]
    switches: Switches
    method: Callable[[Switches, bool], Merge]
    terms: Callable[[Numbers, Switches], Variation]
    base: Role = "origin"
    most: int | None = None
    fills_up: bool = False


@dataclass(frozen=True)
class Passthrough(Linear):
    """The tensors of one model, or of several models' layers, as they are, times a scale."""

    name: ClassVar[str] = "passthrough"
    most_experts: ClassVar[int | None] = 1

    normalize: bool = False


def _averaged(look: Numbers, on: Switches) -> Variation:
    return Variation(look.per_expert("weight"))


def _scaled(look: Numbers, on: Switches) -> Variation:
    return Variation(look.per_expert("scale", 1.0))


def _turned(look: Numbers, on: Switches) -> Variation:
    return Variation(settings={"t": look.of_tensor("t")})


def _untouched(look: Numbers, on: Switches) -> Variation:
    return Variation()


def _weighed(look: Numbers, on: Switches) -> Variation:
    """The way from the first of two models to the second, from their weights."""
    first, second = look.per_expert("weight")
    total = first + second
    return Variation(settings={"t": 0.5 if abs(total) < _SMALLEST_TOTAL else second / total})


def _renamed(**settings: tuple[str, float]) -> Callable[[Numbers, Switches], Variation]:
    """Settings that mergekit calls something else, each with its name there and its default."""
    return lambda look, on: Variation(settings={name: look.of_tensor(*there) for name, there in settings.items()})


def _origin(based: bool) -> Origin:
    return "base" if based else "zero"


def _along(on: Switches) -> Along:
    if on["nuslerp_flatten"]:
        return "tensor"
    return "column" if on["nuslerp_row_wise"] else "row"


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

_SMALLEST_TOTAL = 1e-6
"""Between weights with a smaller sum its nuslerp goes half the way."""

METHODS: dict[str, MergekitMethod] = {
    "linear": MergekitMethod(
        ("weight",),
        (),
        {"normalize": True},
        lambda on, based: Linear(normalize=on["normalize"]),
        _averaged,
        "expert",
        fills_up=True,
    ),
    "slerp": MergekitMethod((), ("t",), {}, lambda on, based: Slerp(), _turned, "first", most=1),
    "nuslerp": MergekitMethod(
        ("weight",),
        (),
        {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        lambda on, based: NuSlerp(origin=_origin(based), along=_along(on)),
        _weighed,
        "centre",
        most=2,
    ),
    "multislerp": MergekitMethod(
        ("weight",),
        (),
        {"normalize_weights": True},
        lambda on, based: MultiSlerp(origin=_origin(based), normalize=on["normalize_weights"]),
        _averaged,
        "centre",
    ),
    "karcher": MergekitMethod(
        (),
        ("max_iter", "tol"),
        {},
        lambda on, based: Karcher(),
        _renamed(iterations=("max_iter", 10), tolerance=("tol", 1e-5)),
        "expert",
    ),
    "nearswap": MergekitMethod((), ("t",), {}, lambda on, based: NearSwap(), _turned, most=1),
    "arcee_fusion": MergekitMethod((), (), {}, lambda on, based: ArceeFusion(), _untouched, most=1),
    "ram": MergekitMethod((), ("epsilon",), {}, lambda on, based: Ram(), _renamed(threshold=("epsilon", 1e-5))),
    "ramplus_tl": MergekitMethod(
        (),
        ("r", "alpha", "epsilon"),
        {},
        lambda on, based: Ram(),
        _renamed(threshold=("epsilon", 1e-5), amplify=("r", 0.1), most=("alpha", 0.2)),
    ),
    "sce": MergekitMethod((), ("select_topk",), {}, lambda on, based: Sce(), _renamed(density=("select_topk", 1.0))),
    "task_arithmetic": MergekitMethod(
        ("weight",), ("lambda",), {"normalize": False}, lambda on, based: TaskArithmetic(), _added()
    ),
    "ties": MergekitMethod(
        ("weight", "density"),
        ("lambda",),
        {"normalize": True},
        lambda on, based: Ties(trim="tensor", average=_average(on), undecided="positive"),
        _elected(density=1.0),
    ),
    "dare_linear": MergekitMethod(
        ("weight", "density"),
        ("lambda",),
        {"normalize": False, "rescale": True},
        lambda on, based: DareLinear(rescale=_rescale(on)),
        _added(density=1.0),
    ),
    "dare_ties": MergekitMethod(
        ("weight", "density"),
        ("lambda",),
        {"normalize": False, "rescale": True},
        lambda on, based: DareTies(rescale=_rescale(on), average=_average(on), undecided="positive"),
        _elected(density=1.0),
    ),
    "della": MergekitMethod(
        ("weight", "density", "epsilon"),
        ("lambda",),
        {"normalize": True, "rescale": True},
        lambda on, based: Della(rescale=_rescale(on), average=_average(on), undecided="positive"),
        _elected(density=1.0, epsilon=0.15),
    ),
    "della_linear": MergekitMethod(
        ("weight", "density", "epsilon"),
        ("lambda",),
        {"normalize": False, "rescale": True},
        lambda on, based: DellaLinear(rescale=_rescale(on)),
        _added(density=1.0, epsilon=0.15),
    ),
    "breadcrumbs_ties": MergekitMethod(
        ("weight", "density", "gamma"),
        ("lambda",),
        {"normalize": False},
        lambda on, based: BreadcrumbsTies(average=_average(on), undecided="positive"),
        _elected(density=1.0, gamma=0.01),
    ),
    "breadcrumbs": MergekitMethod(
        ("weight", "density", "gamma"),
        ("lambda",),
        {"normalize": False},
        lambda on, based: Breadcrumbs(),
        _added(density=1.0, gamma=0.01),
    ),
    "model_stock": MergekitMethod(
        (),
        (),
        {"filter_wise": False},
        lambda on, based: ModelStock(filter_wise=on["filter_wise"], smallest_norms=1e-6),
        _untouched,
    ),
    "passthrough": MergekitMethod(("scale",), (), {}, lambda on, based: Passthrough(), _scaled, "expert", most=1),
}
