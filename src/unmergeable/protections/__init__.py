"""Protections, one file (or folder) each: what they are is in :mod:`.base`, what exact ones share in :mod:`.exact`."""

from collections.abc import Mapping
from typing import TypeVar

from unmergeable.checkpoint.plan import output_like
from unmergeable.errors import UsageError
from unmergeable.protections.anchor_repulsive import AnchorRepulsive
from unmergeable.protections.base import Extras, Facts, Inputs, Protection, ProtectionRequirements, Rewrite
from unmergeable.protections.collapse import Collapse
from unmergeable.protections.controls import Control, Identity, Noise, Scale
from unmergeable.protections.exact import ExactProtection, Weights
from unmergeable.protections.gauge import LargestGauge
from unmergeable.protections.mergebarrier import MergeBarrier
from unmergeable.protections.mergeguard import MergeGuard
from unmergeable.protections.mergelock import MergeLock
from unmergeable.protections.params import PaRaMS
from unmergeable.protections.sensitivity_shield import SensitivityShield
from unmergeable.protections.taylor_mlp import TaylorMLP
from unmergeable.protections.trap2 import Trap2
from unmergeable.registry import Registry

__all__ = [
    "CONTROLS",
    "PROTECTIONS",
    "AnchorRepulsive",
    "Collapse",
    "Control",
    "ExactProtection",
    "Extras",
    "Facts",
    "Inputs",
    "LargestGauge",
    "MergeBarrier",
    "MergeGuard",
    "MergeLock",
    "PaRaMS",
    "Protection",
    "ProtectionRequirements",
    "Rewrite",
    "SensitivityShield",
    "TaylorMLP",
    "Trap2",
    "Weights",
    "output_like",
    "register_protection",
]

PROTECTIONS = Registry(
    "protection",
    "unmergeable.protections",
    (
        MergeLock,
        PaRaMS,
        LargestGauge,
        TaylorMLP,
        MergeBarrier,
        MergeGuard,
        SensitivityShield,
        Collapse,
        Trap2,
        AnchorRepulsive,
    ),
)
CONTROLS: Mapping[str, type[Control]] = {cls.name: cls for cls in (Identity, Noise, Scale)}
"""Protections in form only, for audits; ``protect`` refuses them."""

Method = TypeVar("Method", bound=type[Protection])


def register_protection(method: Method) -> Method:
    """Add a protection under its ``name``; returns the class, to be used as a decorator.

    Raises:
        UsageError: it is no :class:`Protection`, has no name, or one that is taken.
    """
    if not issubclass(method, Protection):
        raise UsageError(f"{method.__qualname__} is no protection: derive it from unmergeable.protections.Protection.")
    return PROTECTIONS.register(method)
