"""What the manifest of a checkpoint says of how it was made. It may be a stranger's; nothing is taken on trust."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from unmergeable.checkpoint.manifest import Manifest
from unmergeable.errors import CheckpointError, shown

EARLIER_STEPS = "earlier_steps"
"""What the manifest of a composition says of the steps before the last, a list of their manifests without outputs."""

CONDITION_WITHOUT_MANIFEST = 1.0
"""When nothing says how a checkpoint was made, no rounding but that of what is stored is assumed."""


def methods_of(details: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods that a manifest's part of the caller names, in order; none where it names none."""
    return tuple(shown(name)[1:-1] for name in _names(details.get("recipe")) if isinstance(name, str))


def earlier_steps(manifest: Manifest | None) -> tuple[Mapping[str, Any], ...]:
    """What is said of the steps before the last.

    Raises:
        CheckpointError: it is no list of objects.
    """
    steps = () if manifest is None else manifest.details.get(EARLIER_STEPS, [])
    if not isinstance(steps, list | tuple) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"the manifest's {EARLIER_STEPS} are no list of objects: download the checkpoint again.")
    return tuple(steps)


def condition_of(manifest: Manifest | None) -> float:
    """How much more than once a rounding error counts, as far as the manifest tells.

    Raises:
        CheckpointError: it says something that is no such number.
    """
    value = CONDITION_WITHOUT_MANIFEST if manifest is None else manifest.details.get("condition_bound", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise CheckpointError(
            f"the manifest's condition_bound is {shown(value)}, not a number of at least 1: download the checkpoint "
            "again."
        )
    return float(value)


def _names(recipe: object) -> Iterator[object]:
    if not isinstance(recipe, dict):
        return
    steps = recipe.get("steps", [recipe])
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and "method" in step:
            yield step["method"]
