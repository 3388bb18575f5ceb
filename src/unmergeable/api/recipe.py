"""From ``--method a,b --set name=value`` to a list of configured protections, and back from a key file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmergeable.architecture import Architecture, Space
from unmergeable.errors import UsageError
from unmergeable.gauge.gauge import Gauge
from unmergeable.gauge.key import Key
from unmergeable.protections import PROTECTIONS, GaugeProtection
from unmergeable.settings import configure, nearest, settings_of


def configure_protections(method: str | Sequence[str], settings: Mapping[str, object]) -> tuple[GaugeProtection, ...]:
    """The protections named (a list, or one text with commas), in order.

    With several, a setting is written ``method.name``.

    Raises:
        UsageError: an unknown method or setting, with the nearest known one.
    """
    names = [name.strip() for name in method.split(",")] if isinstance(method, str) else list(method)
    for name in names:
        if name not in PROTECTIONS:
            raise UsageError(f"no protection is called {name!r}{nearest(name, PROTECTIONS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"method list {','.join(names)!r} names a protection twice; name each once.")
    values: dict[str, dict[str, object]] = {name: {} for name in names}
    for key, value in settings.items():
        owner, _, setting = key.rpartition(".")
        if not owner and len(names) > 1:
            raise UsageError(
                f"setting {key!r}: with several methods, write which one it is for, e.g. {names[0]}.{key}."
            )
        if owner and owner not in values:
            raise UsageError(
                f"setting {key!r} is for {owner!r}, which is not among the methods{nearest(owner, values)}"
            )
        values[owner or names[0]][setting] = value
    return tuple(configure(PROTECTIONS[name], values[name]) for name in names)


def recipe_of(protections: Sequence[GaugeProtection], architecture: Architecture) -> dict[str, Any]:
    """What was done, without secrets: enough to redo it, given the key."""
    return {
        "steps": [{"method": protection.name, "settings": settings_of(protection)} for protection in protections],
        "architecture": architecture.family,
    }


def protections_of(recipe: Mapping[str, Any]) -> tuple[GaugeProtection, ...]:
    """The protections a recipe names, in order."""
    steps = recipe["steps"]
    for step in steps:
        if step["method"] not in PROTECTIONS:
            raise UsageError(
                f"the key was made by method {step['method']!r}, unknown to this version; update unmergeable."
            )
    return tuple(configure(PROTECTIONS[step["method"]], step["settings"]) for step in steps)


def gauges_of(protections: Sequence[GaugeProtection], architecture: Architecture, key: Key) -> tuple[Gauge, ...]:
    """The secret gauges of a recipe, in the order they were applied."""
    stream = key.stream()
    return tuple(
        protection.gauge(architecture, stream.child(f"{index}.{protection.name}"))
        for index, protection in enumerate(protections)
    )


def spaces_of(protections: Sequence[GaugeProtection], architecture: Architecture) -> dict[str, Space]:
    """Every basis the protections change."""
    return {name: space for protection in protections for name, space in protection.spaces(architecture).items()}


def condition_bound(protections: Sequence[GaugeProtection]) -> float:
    """Bound on the condition number of all protections applied one after another."""
    bound = 1.0
    for protection in protections:
        bound *= protection.condition
    return bound
