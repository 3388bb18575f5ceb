"""What an attacker who holds the base does to a protected checkpoint before merging it, one file for each method."""

from __future__ import annotations

from unmergeable.recoveries.kabsch import Kabsch
from unmergeable.recoveries.nearest_orbit import NearestOrbit
from unmergeable.recoveries.recovery import Estimate, Fit, Recovery

__all__ = ["RECOVERIES", "Estimate", "Fit", "Kabsch", "NearestOrbit", "Recovery"]

RECOVERIES: dict[str, type[Recovery]] = {cls.name: cls for cls in (Kabsch, NearestOrbit)}
