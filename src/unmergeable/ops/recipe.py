"""From exact protections to what is recorded of them, and from a key file back to the same gauges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unmergeable.architecture import Architecture, Space
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.gauge.gauge import Gauge
from unmergeable.gauge.key import Key
from unmergeable.progress import Progress
from unmergeable.protections import PROTECTIONS, GaugeProtection, Weights
from unmergeable.settings import configure, settings_of


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


def orders_of(
    protections: Sequence[GaugeProtection],
    architecture: Architecture,
    expert: TensorSource,
    base: TensorSource,
    progress: Progress,
) -> dict[str, list[int]]:
    """What the key has to keep besides the secret, by step and space: orders found in the expert's weights."""
    return {
        f"{index}.{space}": order.tolist()
        for index, protection in enumerate(protections)
        for space, order in protection.orders(architecture, expert, base, progress).items()
    }


def gauges_of(
    protections: Sequence[GaugeProtection], architecture: Architecture, key: Key, source: TensorSource
) -> tuple[Gauge, ...]:
    """The secret gauges of a recipe, in the order they were applied; ``source`` as in ``Weights``."""
    stream = key.stream()
    gauges: list[Gauge] = []
    for index, protection in enumerate(protections):
        step = f"{index}."
        orders = {
            name.removeprefix(step): torch.tensor(key.orders[name]) for name in key.orders if name.startswith(step)
        }
        weights = Weights(source, orders)
        gauges += protection.gauges(architecture, stream.child(f"{step}{protection.name}"), weights)
    return tuple(gauges)


def spaces_of(protections: Sequence[GaugeProtection], architecture: Architecture) -> dict[str, Space]:
    """Every basis the protections change."""
    return {name: space for protection in protections for name, space in protection.spaces(architecture).items()}


def unties(protections: Sequence[GaugeProtection]) -> bool:
    """Whether the output head is to be stored apart from the embedding."""
    return any(bool(settings_of(protection).get("untie")) for protection in protections)


def moves_streams(spaces: Mapping[str, Space]) -> bool:
    """Whether residual streams, or the gains of their norms, are among what changes."""
    return any(space.role in ("norm", "residual") for space in spaces.values())


def condition_bound(protections: Sequence[GaugeProtection]) -> float:
    """Bound on how much more than once a rounding error counts after all protections, applied one after another."""
    if len(protections) == 1:
        return protections[0].bound
    return math.prod(protection.stretch for protection in protections)
