"""Attackers by name and version: the merges and recoveries that an audit tries when a plan does not list its own.

A name without a version is the newest version. What a version does never changes, so that audits stay comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmergeable.evaluation.plans.fields import require_named


@dataclass(frozen=True)
class Attacker:
    """What is tried, as a plan lists it. ``recoveries`` with commas are done one after another."""

    merges: tuple[str, ...]
    recoveries: tuple[str, ...]


ATTACKERS = {
    "standard-0": Attacker(
        merges=("linear", "task_arithmetic", "ties", "slerp"),
        recoveries=(
            "nearest_orbit",
            "canonicalise",
            "kabsch",
            "neuron_matching",
            "diagonal_ratio",
            "revert_to_base",
            "task_vector_rescale",
            "taylor_inversion",
            "taylor_inversion, nearest_orbit",
        ),
    )
}
"""``standard-0``: every recovery that needs no more than the release and the base, and the usual merges."""

STUDENTS: tuple[Mapping[str, Any] | str, ...] = (
    "distil",
    {"name": "distil, from its own model", "method": "distil", "settings": {"start": "source"}},
)
"""What an attacker does who only runs the release, as a plan lists it: students of it, to merge with."""

NEWEST = {"standard": "standard-0"}


def attacker_named(name: str, where: str) -> Attacker:
    """The attacker of a name, with a version or without.

    Raises:
        BadInput: there is none; ``where`` begins the message.
    """
    require_named(name, [*NEWEST, *ATTACKERS], "attacker", where)
    return ATTACKERS[NEWEST.get(name, name)]
