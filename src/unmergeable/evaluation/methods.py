"""What the methods that a plan names need and promise: all that plans ask protections, merges and attacks about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmergeable.attacks import ATTACKS
from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.merges import MERGES, AdaMerging, Merge
from unmergeable.ops.steps import steps_of
from unmergeable.protections import SensitivityShield
from unmergeable.registry import Requirements
from unmergeable.settings import configure, nearest

Settings = Mapping[str, Any]

ON_MERGES = ("few_shot", "grad_erase", "unmask")
"""Attacks that work on a merge, and not on a release before it is merged."""


def require_known(kind: str, method: str, settings: Settings) -> None:
    """Raises BadInput for an unknown ``kind`` ("merge", "recovery") of method, UsageError for a setting it lacks."""
    registry: Mapping[str, type] = MERGES if kind == "merge" else ATTACKS
    if method not in registry:
        raise BadInput(f"no {kind} is called {method!r}{nearest(method, registry)}")
    configure(registry[method], settings)


def merge_of(method: str, settings: Settings) -> Merge:
    """The merge of this name."""
    merge: Merge = configure(MERGES[method], settings)
    return merge


def merge_learns(method: str) -> bool:
    """Whether a merge takes data."""
    return MERGES.require(method)().needs_data  # type: ignore[no-any-return]


def merge_learns_coefficients(method: str) -> bool:
    """Whether unlabelled data are all that a merge takes: an attacker can have them."""
    return method == AdaMerging.name


def merge_takes_coefficients(method: str, settings: Settings) -> bool:
    """Whether there is a coefficient of each expert to choose."""
    if merge_learns(method):
        return False
    try:
        merge_of(method, settings).resolve([0.5, 0.5])
    except UsageError:
        return False
    return True


def attack_reads(method: str) -> frozenset[str]:
    """What an attack takes besides the release and the base: "data", "sources"."""
    requirements: Requirements = ATTACKS[method]().requirements()
    return frozenset(requirements.needs) - {"base"}


def threat_model_of_merge(method: str) -> ThreatModel:
    """The weakest attacker who can merge like that."""
    return ThreatModel.UNLABELLED if merge_learns(method) else ThreatModel.OFF_THE_SHELF


def threat_model_of_attack(method: str) -> ThreatModel:
    """The weakest attacker who can do that to a release."""
    return ThreatModel.UNLABELLED if "data" in attack_reads(method) else ThreatModel.WHITE_BOX


def is_exact(protection: str, settings: Settings) -> bool:
    """Whether every step keeps the function and a key leads back."""
    return all(step.has_key for step in steps_of(protection, settings))


def has_key(protection: str, settings: Settings) -> bool:
    """Whether protecting makes a key file."""
    return any(step.has_key for step in steps_of(protection, settings))


def protection_reads(protection: str, settings: Settings) -> frozenset[str]:
    """What it takes of the owner's with these settings: "data", "head", "encoder", "siblings".

    Raises:
        UsageError: an unknown method or setting.
    """
    return frozenset[str]().union(*(step.reads for step in steps_of(protection, settings)))


def require_siblings(protection: str, settings: Settings, count: int) -> None:
    """Raises UsageError unless a shield has a sibling for each of its coefficients."""
    for step in steps_of(protection, settings):
        if SensitivityShield.name in step.settings:
            configure(SensitivityShield, step.settings[SensitivityShield.name]).require_siblings(count)
