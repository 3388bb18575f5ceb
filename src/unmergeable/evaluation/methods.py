"""What the methods that a plan names need and promise: all that plans ask protections, merges and attacks about."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unmergeable.attacks import ATTACKS, Attack, AttackRequirements
from unmergeable.errors import UsageError
from unmergeable.merges import MERGES, Merge, TaskArithmetic
from unmergeable.ops.steps import steps_of
from unmergeable.protections import SensitivityShield
from unmergeable.settings import configure

Settings = Mapping[str, Any]

ON_MERGES = ("few_shot", "grad_erase", "unmask")
"""Attacks that work on a merge, and not on a release before it is merged."""


def merge_of(method: str, settings: Settings) -> Merge:
    merge: Merge = configure(MERGES[method], settings)
    return merge


def merge_learns(method: str) -> bool:
    return MERGES.require(method)().needs_data  # type: ignore[no-any-return]


def is_sum(method: str) -> bool:
    """Whether a merge adds up task vectors and does nothing else."""
    return issubclass(MERGES.require(method), TaskArithmetic)


def merge_takes_coefficients(method: str, settings: Settings) -> bool:
    """Whether there is a coefficient of each expert to choose."""
    if merge_learns(method):
        return False
    try:
        merge_of(method, settings).resolve([0.5, 0.5])
    except UsageError:
        return False
    return True


NO_SETTINGS: Settings = MappingProxyType({})


def attack_requirements(method: str, settings: Settings = NO_SETTINGS) -> AttackRequirements:
    """What an attack needs with these settings."""
    attack: Attack = configure(ATTACKS[method], settings)
    return attack.requirements()


def attack_reads(method: str, settings: Settings = NO_SETTINGS) -> frozenset[str]:
    """What an attack takes besides the release and the base: "data", "sources"."""
    return frozenset(attack_requirements(method, settings).needs) - {"base"}


def has_key(protection: str, settings: Settings) -> bool:
    """Whether protecting makes a key file."""
    return any(step.has_key for step in steps_of(protection, settings))


def protection_reads(protection: str, settings: Settings) -> frozenset[str]:
    """What it takes of the owner's with these settings: "data", "head", "encoder", "generic", "siblings".

    Raises:
        UsageError: an unknown method or setting.
    """
    return frozenset[str]().union(*(step.reads for step in steps_of(protection, settings)))


def require_siblings(protection: str, settings: Settings, count: int) -> None:
    """Raises UsageError unless a shield has a sibling for each of its coefficients."""
    for step in steps_of(protection, settings):
        if SensitivityShield.name in step.settings:
            configure(SensitivityShield, step.settings[SensitivityShield.name]).require_siblings(count)
