"""Recipe files: the methods of a protection and their settings, in JSON or YAML.

{"method": "mergelock", "settings": {"condition": 8}}
{"steps": [{"method": "sensitivity_shield"}, {"method": "gauge", "settings": {"condition": 8}}]}

Every protection may be a step; the library says which orders make sense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmergeable.errors import BadInput, UsageError, first_line
from unmergeable.settings import nearest
from unmergeable.yaml_text import parse_yaml

Recipe = tuple[list[str], dict[str, object]]
"""Method names in order, and settings named ``method.name`` (``name`` alone where there is one method)."""

_STEP_KEYS = dict.fromkeys(("method", "settings"))
_FILE_KEYS = dict.fromkeys(("method", "settings", "steps"))


def read_recipe(path: Path) -> Recipe:
    """The methods and settings that a file asks for.

    Raises:
        BadInput: the file is not there or not readable as JSON or YAML.
        UsageError: a key that means nothing (with the nearest one that does), or a value of the wrong kind.
    """
    document = _mapping(_load(path), f"recipe {path}")
    if "steps" not in document:
        _require_known(document, _FILE_KEYS, f"recipe {path}")
        method, settings = _read_step(document, f"recipe {path}")
        return [method], settings
    _require_known(document, {"steps": None}, f"recipe {path}, which has steps,")
    steps = document["steps"]
    if not isinstance(steps, list) or not steps:
        raise UsageError(f"recipe {path}: steps must be a list with at least one step.")
    read = [_read_step(step, f"recipe {path}, step {number},") for number, step in enumerate(steps, 1)]
    if len(read) == 1:
        return [read[0][0]], read[0][1]
    combined = {f"{method}.{name}": value for method, settings in read for name, value in settings.items()}
    return [method for method, _ in read], combined


def _read_step(value: object, where: str) -> tuple[str, dict[str, object]]:
    step = _mapping(value, where)
    _require_known(step, _STEP_KEYS, where)
    method = step.get("method")
    if not isinstance(method, str):
        raise UsageError(f"{where} must name its method; `unmergeable methods` lists them.")
    settings = step.get("settings")
    return method, dict(_mapping({} if settings is None else settings, f"{where} settings"))


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{where} must be a mapping from names to values.")
    return value


def _require_known(document: Mapping[str, Any], known: Mapping[str, None], where: str) -> None:
    for name in document:
        if name not in known:
            raise UsageError(f"{where} has the unknown key {name!r}{nearest(name, known)}")


def _load(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise BadInput(f"recipe {path} cannot be read: {reason}; check the path.") from None
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"recipe {path} is not valid JSON: {first_line(error)}.") from None
    return parse_yaml(text, f"recipe {path}")
