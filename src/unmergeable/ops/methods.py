"""What there is: every protection, merge and recovery, what each needs, and what a family leaves to it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unmergeable.architecture.families import FAMILIES, described
from unmergeable.attacks import ATTACKS
from unmergeable.defaults import release_settings
from unmergeable.merges import MERGES
from unmergeable.protections import CONTROLS, PROTECTIONS, Protection
from unmergeable.protections.exact import ExactProtection
from unmergeable.registry import Requirements


@dataclass(frozen=True)
class Setting:
    """A setting of a method: the name of its type, what there is to choose from if it is a choice, and its default."""

    name: str
    type: str
    default: object
    choices: tuple[object, ...] = ()

    def to_json(self) -> dict[str, Any]:
        choices = {"choices": list(self.choices)} if self.choices else {}
        return {"name": self.name, "type": self.type, **choices, "default": self.default}

    def to_json_schema(self) -> dict[str, Any]:
        if self.choices:
            return {"enum": list(self.choices)}
        return {"type": {"float": "number", "int": "integer", "bool": "boolean"}.get(self.type, "string")}


@dataclass(frozen=True)
class Validity:
    """What a family of models leaves to a protection: the group it draws from, or the ``reason`` why it has none."""

    group: str | None = None
    reason: str | None = None

    @property
    def is_valid(self) -> bool:
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        told = {"group": self.group, "reason": self.reason}
        return {"valid": self.is_valid, **{name: text for name, text in told.items() if text is not None}}


@dataclass(frozen=True)
class MethodEntry:
    """A method with the settings that it has where nothing is said. ``families`` is of protections only."""

    name: str
    summary: str
    exact: bool
    needs: tuple[str, ...]
    settings: tuple[Setting, ...]
    families: Mapping[str, Validity] = field(default_factory=dict)
    is_control: bool = False

    @classmethod
    def of(cls, method: Any, families: Mapping[str, Validity] | None = None) -> MethodEntry:
        requirements: Requirements = method().requirements()
        return cls(
            name=method.name,
            summary=_summary(method),
            exact=requirements.exact,
            needs=requirements.needs,
            settings=_with_release_settings(method.name, _settings(method)),
            families=families or {},
            is_control=getattr(method, "is_control", False),
        )

    def to_json(self) -> dict[str, Any]:
        families = {family: validity.to_json() for family, validity in self.families.items()}
        return {
            "name": self.name,
            "summary": self.summary,
            "exact": self.exact,
            "needs": list(self.needs),
            "settings": [setting.to_json() for setting in self.settings],
            **({"families": families} if families else {}),
            **({"control": True} if self.is_control else {}),
        }


@dataclass(frozen=True)
class MethodsResult:
    """``families``: for each family, the group that survives between queries and keys, and why it is no larger."""

    protections: tuple[MethodEntry, ...]
    controls: tuple[MethodEntry, ...]
    merges: tuple[MethodEntry, ...]
    recoveries: tuple[MethodEntry, ...]
    families: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "protections": [entry.to_json() for entry in self.protections],
            "controls": [entry.to_json() for entry in self.controls],
            "merges": [entry.to_json() for entry in self.merges],
            "recoveries": [entry.to_json() for entry in self.recoveries],
            "families": dict(self.families),
        }


def methods() -> MethodsResult:
    """Every method, those of other packages included, with its needs, its settings, and its validity per family."""
    families = tuple(FAMILIES)
    return MethodsResult(
        protections=tuple(
            MethodEntry.of(cls, {family: _validity(cls(), family) for family in families})
            for cls in PROTECTIONS.values()
        ),
        controls=tuple(map(MethodEntry.of, CONTROLS.values())),
        merges=tuple(map(MethodEntry.of, MERGES.values())),
        recoveries=tuple(map(MethodEntry.of, ATTACKS.values())),
        families={family: described(family).query_key for family in families},
    )


def schema() -> Mapping[str, object]:
    """JSON Schema of a recipe: the methods there are, and the settings of each."""
    steps = [
        {
            "type": "object",
            "properties": {
                "method": {"const": name},
                "settings": {
                    "type": "object",
                    "properties": {setting.name: setting.to_json_schema() for setting in _settings(cls)},
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


def _validity(protection: Protection, family: str) -> Validity:
    reason = protection.unsupported(family)
    if reason is not None or not isinstance(protection, ExactProtection):
        return Validity(reason=reason)
    groups = described(family)
    whole = f"{groups.query_key}; residual stream: {groups.residual}"
    return Validity(whole if protection.residual else groups.query_key)


def _with_release_settings(name: str, settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """The defaults as they hold for who names the method and no more."""
    changed = release_settings(name, {})
    return tuple(replace(item, default=changed.get(item.name, item.default)) for item in settings)


def _settings(method: Any) -> tuple[Setting, ...]:
    hints = get_type_hints(method)
    return tuple(_setting(item.name, hints[item.name], item.default) for item in dataclasses.fields(method))


def _setting(name: str, hint: Any, default: object) -> Setting:
    if get_origin(hint) is Literal:
        return Setting(name, "str", default, get_args(hint))
    return Setting(name, getattr(hint, "__name__", str(hint)), default)


def _summary(method: Any) -> str:
    """A method's ``summary``, or the first line of its module's docstring."""
    text = getattr(method, "summary", None) or sys.modules[method.__module__].__doc__ or method.__doc__ or method.name
    return str(text).strip().splitlines()[0].removeprefix(f"``{method.name}``: ").rstrip(".")
