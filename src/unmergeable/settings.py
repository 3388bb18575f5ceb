"""Settings of a method: a frozen dataclass is the whole declaration; this builds one from names and values."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from unmergeable.errors import UsageError, shown

Method = TypeVar("Method")


def configure(method: type[Method], values: Mapping[str, object]) -> Method:
    """An instance of the dataclass ``method`` with ``values`` in place of its defaults.

    Text is read as the field's type, as it comes from a command line. ``validate()`` is called when there is one.

    Raises:
        UsageError: an unknown name (the nearest known one is given), a value of another type or out of range.
    """
    name = str(getattr(method, "name", method.__name__))
    hints = get_type_hints(method)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UsageError(f"{name} has no setting {key!r}{nearest(key, fields)}")
    instance = method(**{key: _read(name, key, fields[key], value) for key, value in values.items()})
    validate = getattr(instance, "validate", None)
    if validate is not None:
        validate()
    return instance


ADDED_LATER: Mapping[str, bool] = {"added later": True}
"""Metadata of a setting that a method got after recipes were published: one that keeps its default is not recorded, so
that the recipes of before, and with them the fingerprints of keys, stay as they were."""


def settings_of(instance: object) -> dict[str, Any]:
    """Names and values of the settings, ready for JSON; see :data:`ADDED_LATER` for those that are left out."""
    values: dict[str, Any] = dataclasses.asdict(instance)  # type: ignore[call-overload]
    for field in dataclasses.fields(instance):  # type: ignore[arg-type]
        if field.metadata == ADDED_LATER and values[field.name] == field.default:
            del values[field.name]
    return values


def nearest(word: str, known: Mapping[str, object]) -> str:
    """The end of an error message, full stop included: the known name closest to ``word``, or all of them."""
    close = difflib.get_close_matches(word, list(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}." if known else "; it has none."


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """``["condition=8"]`` as a mapping.

    Raises:
        UsageError: for one without ``=``, or a name given twice.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise UsageError(f"--set {shown(assignment)}: write it as name=value.")
        if key in values:
            raise UsageError(f"--set {key} is given twice; give it once.")
        values[key] = value
    return values


def _read(method: str, key: str, kind: Any, value: object) -> object:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UsageError(f"{method}: {key} must be one of {', '.join(map(str, get_args(kind)))}, not {shown(value)}.")
    try:
        if kind is bool:
            return _read_bool(value)
        if kind in (int, float, str) and not isinstance(value, (int, float, str)):
            raise ValueError("a list or a mapping")  # noqa: TRY301 - one message for all that is wrong
        if kind in (int, float):
            # "True" is no number: a bool is refused although Python counts it as one.
            return kind(str(value))
        if kind is str:
            return str(value)
        if isinstance(value, str):
            value = json.loads(value)
    except (ValueError, RecursionError):
        expected = getattr(kind, "__name__", kind)
        raise UsageError(f"{method}: {key} must be of type {expected}, not {shown(value)}.") from None
    return tuple(value) if isinstance(value, list) else value


def _read_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError("not a truth value")  # noqa: TRY004 - read above with what else is wrong
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if value.lower() not in words:
        raise ValueError(value)
    return words[value.lower()]
