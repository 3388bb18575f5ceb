"""Large numbers for people: ``"16.1 GB"``, ``"8.0 B"``."""

from __future__ import annotations

from collections.abc import Mapping

BYTES: Mapping[str, float] = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}
COUNT: Mapping[str, float] = {"billion": 1e9, "million": 1e6, "thousand": 1e3, "": 1}


def describe_quantity(value: int, units: Mapping[str, float]) -> str:
    """``value`` in the largest of ``units`` that it reaches."""
    unit = fitting_unit(value, units)
    return f"{in_unit(value, unit, units)} {unit}".rstrip()


def fitting_unit(value: int, units: Mapping[str, float]) -> str:
    """The largest unit that ``value`` reaches, or the smallest there is."""
    return next((name for name, size in units.items() if value >= size), list(units)[-1])


def in_unit(value: int, unit: str, units: Mapping[str, float]) -> str:
    """The number alone, with one decimal where the unit is not one."""
    return f"{value / units[unit]:.1f}" if units[unit] > 1 else str(value)
