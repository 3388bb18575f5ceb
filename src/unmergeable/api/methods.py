"""What there is: every protection, merge and recovery, what each needs, and what a family leaves to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_type_hints

from unmergeable.api.data_merges import DATA_DRIVEN
from unmergeable.architecture.families import QUERY_KEY_GROUPS, RESIDUAL_GROUPS
from unmergeable.merges import MERGES
from unmergeable.polynomials.layout import LAYOUTS
from unmergeable.protections import CONTROLS, POLYNOMIAL_PROTECTIONS, PROTECTIONS, GaugeProtection, LargestGauge
from unmergeable.recoveries import RECOVERIES


@dataclass(frozen=True)
class MethodsResult:
    """``families``: for each family, the group that survives between queries and keys, and why it is no larger."""

    protections: tuple[dict[str, Any], ...]
    controls: tuple[dict[str, Any], ...]
    merges: tuple[dict[str, Any], ...]
    recoveries: tuple[dict[str, Any], ...]
    families: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "protections": list(self.protections),
            "controls": list(self.controls),
            "merges": list(self.merges),
            "recoveries": list(self.recoveries),
            "families": self.families,
        }


def methods() -> MethodsResult:
    """Every method, with ``exact``, ``needs``, its settings and their defaults, and its validity per family."""
    families = dict(QUERY_KEY_GROUPS)
    protections = tuple(
        {
            "name": cls.name,
            "summary": cls.summary,
            "exact": cls.exact,
            "needs": list(cls.needs),
            "settings": _settings(cls),
            "families": {name: {"valid": True, "group": _group(cls, name)} for name in families},
        }
        for cls in PROTECTIONS.values()
    )
    protections += tuple(
        {
            "name": cls.name,
            "summary": cls.summary,
            "exact": cls.exact,
            "needs": list(cls.needs),
            "settings": _settings(cls),
            "families": {name: _polynomial_validity(name) for name in families},
        }
        for cls in POLYNOMIAL_PROTECTIONS.values()
    )
    controls = tuple(
        {
            "name": cls.name,
            "summary": cls.summary,
            "exact": cls.name == "identity",
            "needs": ["base"] if cls.name == "scale" else [],
            "settings": _settings(cls),
            "control": True,
        }
        for cls in CONTROLS.values()
    )
    merges = tuple(
        {
            "name": cls.name,
            "summary": _summary(cls),
            "exact": False,
            "needs": [*(["base"] if cls.needs_base else []), *(["data"] if cls.name in DATA_DRIVEN else [])],
            "settings": _settings(cls),
        }
        for cls in MERGES.values()
    )
    recoveries = tuple(
        {
            "name": cls.name,
            "summary": cls.summary,
            "exact": cls.exact,
            "needs": list(cls.needs),
            "settings": _settings(cls),
        }
        for cls in RECOVERIES.values()
    )
    return MethodsResult(protections, controls, merges, recoveries, families)


def _group(cls: type[GaugeProtection], family: str) -> str:
    """What the family leaves to the protection."""
    attention = QUERY_KEY_GROUPS[family]
    return f"{attention}; residual stream: {RESIDUAL_GROUPS[family]}" if cls is LargestGauge else attention


def _polynomial_validity(family: str) -> dict[str, Any]:
    """Whether feed-forwards of a family can be polynomials, and the reason why not."""
    if family in LAYOUTS:
        return {"valid": True}
    return {"valid": False, "reason": "no network of polynomials is known for it"}


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe: the methods there are, and the settings of each."""
    steps = [
        {
            "type": "object",
            "properties": {
                "method": {"const": name},
                "settings": {
                    "type": "object",
                    "properties": {item["name"]: {"type": _json_type(item["type"])} for item in _settings(cls)},
                    "additionalProperties": False,
                },
            },
            "required": ["method"],
            "additionalProperties": False,
        }
        for name, cls in PROTECTIONS.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "unmergeable recipe",
        "type": "object",
        "properties": {"steps": {"type": "array", "minItems": 1, "items": {"oneOf": steps}}},
        "required": ["steps"],
        "additionalProperties": False,
    }


def _settings(cls: Any) -> list[dict[str, Any]]:
    hints = get_type_hints(cls)
    return [
        {
            "name": field.name,
            "type": getattr(hints[field.name], "__name__", str(hints[field.name])),
            "default": field.default,
        }
        for field in dataclasses.fields(cls)
    ]


def _json_type(name: str) -> str:
    return {"float": "number", "int": "integer", "bool": "boolean"}.get(name, "string")


def _summary(cls: Any) -> str:
    """A method's ``summary``, or the first line of its module's docstring."""
    import sys

    text = getattr(cls, "summary", None) or (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
    return str(text).removeprefix(f"``{cls.name}``: ").rstrip(".")
