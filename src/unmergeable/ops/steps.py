"""From ``--method a,b --set name=value`` to the steps of a protection: methods and settings, in an order that works.

Exact methods that stand next to each other are one step, applied at once and rounded once. Every other method is a step
of its own. Not every order makes sense:

    weights        mergeguard, sensitivity_shield    work on the task vector, so before the basis changes
    basis          exact ones, mergebarrier parts=attention
    structure      taylor_mlp, mergebarrier          a network of polynomials has no symmetry map: last
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

from unmergeable.errors import UsageError
from unmergeable.protections import (
    CONTROLS,
    POLYNOMIAL_PROTECTIONS,
    PROTECTIONS,
    WEIGHT_PROTECTIONS,
    MergeBarrier,
    MergeGuard,
    SensitivityShield,
)
from unmergeable.settings import configure, nearest

Changes = Literal["weights", "basis", "structure"]
Reads = Literal["data", "head", "encoder", "siblings"]

_ORDER: tuple[Changes, ...] = ("weights", "basis", "structure")

METHODS: Mapping[str, type[Any]] = {**PROTECTIONS, **POLYNOMIAL_PROTECTIONS, **WEIGHT_PROTECTIONS}
"""Every protection by its name."""


@dataclass(frozen=True)
class Step:
    """Methods that are applied at once: several exact ones, or one.

    ``settings`` by method; all of them valid. ``reads``: what of the owner's it takes.
    """

    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, object]]
    changes: Changes
    reads: frozenset[Reads]

    @property
    def is_exact(self) -> bool:
        """Whether a key undoes it."""
        return all(name in PROTECTIONS for name in self.methods)

    @property
    def name(self) -> str:
        return ",".join(self.methods)


def steps_of(method: str | Sequence[str], settings: Mapping[str, object]) -> tuple[Step, ...]:
    """The steps of the protections named (a list, or one text with commas), in order.

    A setting goes to the method that has it; ``method.name`` says so where several have it.

    Raises:
        UsageError: an unknown method or setting, with the nearest known one; a value out of range; an order that makes
            no sense, with one that does.
    """
    names = [name.strip() for name in method.split(",")] if isinstance(method, str) else list(method)
    names = [name.strip() for name in names]
    _require_known(names)
    values = _by_method(names, settings)
    single = [_single(name, values[name]) for name in names]
    _require_order(single)
    steps: list[Step] = []
    for is_exact, group in groupby(single, key=lambda step: step.is_exact):
        run = list(group)
        steps += [_together(run)] if is_exact else run
    if sum(step.is_exact for step in steps) > 1:
        raise UsageError(
            f"{','.join(names)}: one key undoes exact methods that stand next to each other; put them side by side."
        )
    return tuple(steps)


def has_key(method: str | Sequence[str]) -> bool:
    """Whether one of the methods makes a key."""
    names = method.split(",") if isinstance(method, str) else method
    return any(name.strip() in PROTECTIONS for name in names)


def _require_known(names: Collection[str]) -> None:
    for name in names:
        if name in CONTROLS:
            raise UsageError(
                f"{name!r} is a control and protects nothing; `unmergeable methods` lists the protections."
            )
        if name not in METHODS:
            raise UsageError(f"no protection is called {name!r}{nearest(name, METHODS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"method list {','.join(names)!r} names a protection twice; name each once.")


def _by_method(names: Sequence[str], settings: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The settings of each method by their own names."""
    values: dict[str, dict[str, object]] = {name: {} for name in names}
    for key, value in settings.items():
        owner, _, setting = key.rpartition(".")
        if owner and owner not in values:
            raise UsageError(
                f"setting {key!r} is for {owner!r}, which is not among the methods{nearest(owner, values)}"
            )
        owner = owner or _owner(setting, names)
        if setting in values[owner]:
            raise UsageError(f"setting {setting!r} of {owner} is given twice; give it once.")
        values[owner][setting] = value
    return values


def _owner(setting: str, names: Sequence[str]) -> str:
    """The method that has a setting."""
    if len(names) == 1:
        return names[0]
    fields = {name: [field.name for field in dataclasses.fields(METHODS[name])] for name in names}
    owners = [name for name in names if setting in fields[name]]
    if len(owners) == 1:
        return owners[0]
    if owners:
        choices = " or ".join(f"{name}.{setting}" for name in owners)
        raise UsageError(f"setting {setting!r}: {' and '.join(owners)} have it; write {choices}.")
    known = {field: None for name in names for field in fields[name]}
    raise UsageError(f"{','.join(names)} have no setting {setting!r}{nearest(setting, known)}")


def _single(name: str, values: Mapping[str, object]) -> Step:
    changes, reads = _nature(configure(METHODS[name], values))
    return Step((name,), {name: values}, changes, reads)


def _nature(protection: Any) -> tuple[Changes, frozenset[Reads]]:
    """What a protection with these settings changes and reads."""
    if isinstance(protection, SensitivityShield):
        data: frozenset[Reads] = frozenset({"data", "encoder"} if protection.reads_data else ())
        siblings: frozenset[Reads] = frozenset({"siblings"} if protection.reads_siblings else ())
        return "weights", data | siblings
    if isinstance(protection, MergeGuard):
        return "weights", frozenset({"data", "head", "encoder"} if protection.reads_data else ())
    if protection.name in PROTECTIONS or (isinstance(protection, MergeBarrier) and protection.parts == "attention"):
        return "basis", frozenset()
    return "structure", frozenset({"data"})


def _require_order(steps: Sequence[Step]) -> None:
    for before, after in pairwise(steps):
        if before.changes == "structure" or _ORDER.index(after.changes) < _ORDER.index(before.changes):
            raise UsageError(f"{after.name} after {before.name}: {_why_not(before, after)}{_remedy(steps)}")


def _why_not(before: Step, after: Step) -> str:
    if before.changes == "structure":
        return f"{before.name} leaves a network of polynomials, whose symmetries are not known"
    return f"{after.name} works on the task vector, and {before.name} moves the weights into another basis"


def _remedy(steps: Sequence[Step]) -> str:
    if sum(step.changes == "structure" for step in steps) > 1:
        return "; use one of them."
    ordered = sorted(steps, key=lambda step: _ORDER.index(step.changes))
    return f"; write {','.join(step.name for step in ordered)}."


def _together(steps: Sequence[Step]) -> Step:
    settings = {name: values for step in steps for name, values in step.settings.items()}
    return Step(tuple(step.name for step in steps), settings, "basis", frozenset())
