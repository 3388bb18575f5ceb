"""From ``--method a,b --set name=value`` to the steps of a protection: methods and settings, in an order that works.

Exact methods that stand next to each other are one step, applied at once and rounded once. Every other method is a step
of its own. Not every order makes sense:

    weights        mergeguard, collapse, trap2, …    work on the task vector, so before the basis changes
    basis          exact ones, mergebarrier parts=attention
    structure      taylor_mlp, mergebarrier          a network of polynomials has no symmetry map: last
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import get_args

from unmergeable.defaults import DEFAULT_METHOD, release_settings
from unmergeable.errors import UsageError
from unmergeable.protections import CONTROLS, PROTECTIONS
from unmergeable.protections.base import Protection, ProtectionRequirements, Stage
from unmergeable.protections.exact import ExactProtection, ExactSequence
from unmergeable.settings import configure, nearest

_ORDER: tuple[Stage, ...] = get_args(Stage)

Methods = str | Sequence[str] | None
"""Names of protections: a list, one text with commas, or None for the default."""


@dataclass(frozen=True)
class Step:
    """Methods that are applied at once: several exact ones, or one. ``settings`` by method, as given; all are valid."""

    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, object]]
    protection: Protection

    @property
    def requirements(self) -> ProtectionRequirements:
        return self.protection.requirements()

    @property
    def reads(self) -> frozenset[str]:
        """What it has a use for besides the expert."""
        return self.requirements.reads

    @property
    def has_key(self) -> bool:
        return self.requirements.has_key

    @property
    def single(self) -> Sequence[Protection]:
        return self.protection.methods if isinstance(self.protection, ExactSequence) else (self.protection,)

    @property
    def name(self) -> str:
        return ",".join(self.methods)


def steps_of(method: Methods, settings: Mapping[str, object]) -> tuple[Step, ...]:
    """The steps of the protections named, in order.

    A setting goes to the method that has it; ``method.name`` says so where several have it.

    Raises:
        UsageError: an unknown method or setting, with the nearest known one; a value out of range; an order that makes
            no sense, with one that does.
    """
    if method is None:
        method = DEFAULT_METHOD
    names = [name.strip() for name in (method.split(",") if isinstance(method, str) else method)]
    _require_known(names)
    values = {name: release_settings(name, given) for name, given in _by_method(names, settings).items()}
    single = [Step((name,), {name: values[name]}, configure(PROTECTIONS[name], values[name])) for name in names]
    _require_order(single)
    steps: list[Step] = []
    for is_exact, group in groupby(single, key=lambda step: isinstance(step.protection, ExactProtection)):
        run = list(group)
        steps += [_together(run)] if is_exact else run
    if sum(step.has_key for step in steps) > 1:
        raise UsageError(
            f"{','.join(names)}: one key undoes exact methods that stand next to each other; put them side by side."
        )
    return tuple(steps)


def settings_for_part(method: Methods, settings: Mapping[str, object], part: str | None) -> dict[str, object]:
    """``settings`` with ``part`` for every method.

    Raises:
        UsageError: a method that changes no single part is among them.
    """
    if part is None:
        return dict(settings)
    if not part:
        raise UsageError("part: give the name of a part, or leave it out.")
    every = {name: step for step in steps_of(method, settings) for name in step.methods}
    for name, step in every.items():
        if not step.requirements.exact or not step.has_key:
            raise UsageError(
                f"part: {name} changes the whole network; leave part out, or use gauge, mergelock or params."
            )
    return {**settings, **{f"{name}.part": part for name in every}}


def effective_settings(method: str, settings: Mapping[str, object]) -> dict[str, object]:
    """``settings`` with those that a release gets by itself: what the same words mean when defaults change.

    Raises as :func:`steps_of` does.
    """
    steps = steps_of(method, settings)
    by_method = {name: values for step in steps for name, values in step.settings.items()}
    if len(by_method) == 1:
        return dict(by_method[method])
    return {f"{name}.{key}": value for name, values in by_method.items() for key, value in values.items()}


def _together(steps: Sequence[Step]) -> Step:
    settings = {name: values for step in steps for name, values in step.settings.items()}
    methods = [step.protection for step in steps if isinstance(step.protection, ExactProtection)]
    return Step(tuple(settings), settings, ExactSequence(tuple(methods)))


def _require_known(names: Sequence[str]) -> None:
    for name in names:
        if name in CONTROLS:
            raise UsageError(
                f"{name!r} is a control and protects nothing; `unmergeable methods` lists the protections."
            )
        PROTECTIONS.require(name)
    if len(set(names)) < len(names):
        raise UsageError(f"method list {','.join(names)!r} names a protection twice; name each once.")


def _by_method(names: Sequence[str], settings: Mapping[str, object]) -> dict[str, dict[str, object]]:
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
    if len(names) == 1:
        return names[0]
    fields = {name: [field.name for field in dataclasses.fields(PROTECTIONS[name])] for name in names}
    owners = [name for name in names if setting in fields[name]]
    if len(owners) == 1:
        return owners[0]
    if owners:
        choices = " or ".join(f"{name}.{setting}" for name in owners)
        raise UsageError(f"setting {setting!r}: {' and '.join(owners)} have it; write {choices}.")
    known = {field: None for name in names for field in fields[name]}
    raise UsageError(f"{','.join(names)} have no setting {setting!r}{nearest(setting, known)}")


def _require_order(steps: Sequence[Step]) -> None:
    for before, after in pairwise(steps):
        earlier, later = before.requirements.stage, after.requirements.stage
        if earlier == "structure" or _ORDER.index(later) < _ORDER.index(earlier):
            raise UsageError(f"{after.name} after {before.name}: {_why_not(before, after)}{_remedy(steps)}")


def _why_not(before: Step, after: Step) -> str:
    if before.requirements.stage == "structure":
        return f"{before.name} leaves a network of polynomials, whose symmetries are not known"
    return f"{after.name} works on the task vector, and {before.name} moves the weights into another basis"


def _remedy(steps: Sequence[Step]) -> str:
    if sum(step.requirements.stage == "structure" for step in steps) > 1:
        return "; use one of them."
    ordered = sorted(steps, key=lambda step: _ORDER.index(step.requirements.stage))
    return f"; write {','.join(step.name for step in ordered)}."
