"""What there is: every protection, merge and recovery, what each needs, and what a family leaves to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unmergeable.architecture.families import FAMILIES, described
from unmergeable.attacks import ATTACKS
from unmergeable.merges import MERGES
from unmergeable.ops.data_merges import DATA_DRIVEN
from unmergeable.ops.steps import METHODS
from unmergeable.polynomials.layout import LAYOUTS
from unmergeable.protections import CONTROLS, POLYNOMIAL_PROTECTIONS, PROTECTIONS, LargestGauge, MergeGuard

DIFFUSION = ("UNet2DConditionModel",)
"""Families without a task that has right and wrong answers."""


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
    families = {family: described(family).query_key for family in FAMILIES}
    protections = tuple(
        {
            "name": cls.name,
            "summary": cls.summary,
            "exact": cls.exact,
            "needs": list(cls.needs),
            "settings": _settings(cls),
            "families": {family: _validity(cls, family) for family in families},
        }
        for cls in METHODS.values()
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
        for cls in ATTACKS.values()
    )
    return MethodsResult(protections, controls, merges, recoveries, families)


def _validity(cls: type[Any], family: str) -> dict[str, Any]:
    """What a family leaves to a protection, or the reason why it leaves nothing."""
    if cls.name in PROTECTIONS:
        groups = described(family)
        whole = f"{groups.query_key}; residual stream: {groups.residual}"
        return {"valid": True, "group": whole if cls is LargestGauge else groups.query_key}
    if cls.name in POLYNOMIAL_PROTECTIONS and family not in LAYOUTS:
        return {"valid": False, "reason": "no network of polynomials is known for it"}
    if cls is MergeGuard and family in DIFFUSION:
        return {"valid": False, "reason": "it is trained on the right answers of a task, and these networks have none"}
    return {"valid": True}


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe: the methods there are, and the settings of each."""
    steps = [
        {
            "type": "object",
            "properties": {
                "method": {"const": name},
                "settings": {
                    "type": "object",
                    "properties": {item["name"]: _json_schema(item) for item in _settings(cls)},
                    "additionalProperties": False,
                },
            },
            "required": ["method"],
            "additionalProperties": False,
        }
        for name, cls in METHODS.items()
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
        {"name": field.name, **_type(hints[field.name]), "default": field.default} for field in dataclasses.fields(cls)
    ]


def _type(hint: Any) -> dict[str, Any]:
    """The name of a setting's type, and what there is to choose from if it is a choice."""
    if get_origin(hint) is Literal:
        return {"type": "str", "choices": list(get_args(hint))}
    return {"type": getattr(hint, "__name__", str(hint))}


def _json_schema(setting: Mapping[str, Any]) -> dict[str, Any]:
    if "choices" in setting:
        return {"enum": setting["choices"]}
    return {"type": {"float": "number", "int": "integer", "bool": "boolean"}.get(setting["type"], "string")}


def _summary(cls: Any) -> str:
    """A method's ``summary``, or the first line of its module's docstring."""
    import sys

    text = getattr(cls, "summary", None) or (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
    return str(text).removeprefix(f"``{cls.name}``: ").rstrip(".")
