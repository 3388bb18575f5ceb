"""Protections, one file each: they draw a gauge (see :mod:`.protection`), plan another structure, or other weights."""

from collections.abc import Mapping

from unmergeable.protections.base import GaugeProtection, Weights
from unmergeable.protections.controls import CONTROLS, Control
from unmergeable.protections.gauge import LargestGauge
from unmergeable.protections.mergebarrier import MergeBarrier
from unmergeable.protections.mergeguard import MergeGuard
from unmergeable.protections.mergelock import MergeLock
from unmergeable.protections.params import PaRaMS
from unmergeable.protections.sensitivity_shield import SensitivityShield
from unmergeable.protections.taylor_mlp import TaylorMLP

__all__ = [
    "CONTROLS",
    "POLYNOMIAL_PROTECTIONS",
    "PROTECTIONS",
    "WEIGHT_PROTECTIONS",
    "Control",
    "GaugeProtection",
    "LargestGauge",
    "MergeBarrier",
    "MergeGuard",
    "MergeLock",
    "PaRaMS",
    "SensitivityShield",
    "TaylorMLP",
    "Weights",
]

PROTECTIONS: dict[str, type[GaugeProtection]] = {cls.name: cls for cls in (MergeLock, PaRaMS, LargestGauge)}

POLYNOMIAL_PROTECTIONS: Mapping[str, type[TaylorMLP | MergeBarrier]] = {
    cls.name: cls for cls in (TaylorMLP, MergeBarrier)
}
"""Those that change the structure of the network: calibrated on data, without a key."""

WEIGHT_PROTECTIONS: Mapping[str, type[MergeGuard | SensitivityShield]] = {
    cls.name: cls for cls in (MergeGuard, SensitivityShield)
}
"""Those that change weights and with them the function, and keep the structure: no key."""
