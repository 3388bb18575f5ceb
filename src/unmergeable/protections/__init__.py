"""Protections, one file each: dataclasses that draw a gauge (see :mod:`.protection`), or plan another structure."""

from collections.abc import Mapping

from unmergeable.protections.controls import CONTROLS, Control
from unmergeable.protections.gauge import LargestGauge
from unmergeable.protections.mergebarrier import MergeBarrier
from unmergeable.protections.mergelock import MergeLock
from unmergeable.protections.params import PaRaMS
from unmergeable.protections.protection import GaugeProtection, Weights
from unmergeable.protections.taylor_mlp import TaylorMLP

__all__ = [
    "CONTROLS",
    "POLYNOMIAL_PROTECTIONS",
    "PROTECTIONS",
    "Control",
    "GaugeProtection",
    "LargestGauge",
    "MergeBarrier",
    "MergeLock",
    "PaRaMS",
    "TaylorMLP",
    "Weights",
]

PROTECTIONS: dict[str, type[GaugeProtection]] = {cls.name: cls for cls in (MergeLock, PaRaMS, LargestGauge)}

POLYNOMIAL_PROTECTIONS: Mapping[str, type[TaylorMLP | MergeBarrier]] = {
    cls.name: cls for cls in (TaylorMLP, MergeBarrier)
}
"""Those that change the structure of the network: calibrated on data, without a key."""
