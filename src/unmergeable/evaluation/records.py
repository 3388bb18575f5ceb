"""Results as frozen dataclasses that are JSON on disk: an object has the fields of its class, in their order.

@dataclass(frozen=True, kw_only=True)
class Trial(Record):
    rider: str
    interval: tuple[float | None, float | None]
    samples: int | None = optional()            not written when it is None
    facts: Mapping[str, Any] = inlined()        its entries stand beside the other fields

A float that is not finite, which JSON does not have, is written as null and read as NaN.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from unmergeable.errors import shown
from unmergeable.evaluation.threat_models import ThreatModel

Self = TypeVar("Self", bound="Record")

OPTIONAL = types.MappingProxyType({"optional": True})
"""Metadata of a field that is left out of the JSON when it is None."""

INLINED = types.MappingProxyType({"inlined": True})
"""Metadata of a field, a record or a mapping, whose entries are written among those of the record that has it."""


_SCALARS: Mapping[Any, Any] = {bool: bool, int: int, float: (int, float), str: str}


@dataclasses.dataclass(frozen=True)
class Record:
    """A part of a result."""

    def to_json(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        document: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("inlined"):
                document |= _written(value)
            elif not (value is None and field.metadata.get("optional")):
                document[field.name] = _written(value)
        return document

    @classmethod
    def from_json(cls: type[Self], document: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`; entries that are no fields are passed over.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the document is none of this kind.
        """
        kinds = _kinds(cast(Hashable, cls))
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.metadata.get("inlined"):
                own = {key: value for key, value in document.items() if key not in kinds}
                values[field.name] = _read(kinds[field.name], own)
            elif field.name in document:
                values[field.name] = _read(kinds[field.name], document[field.name])
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise KeyError(field.name)
        return cls(**values)


def _written(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, ThreatModel):
        return value.code
    if isinstance(value, Mapping):
        return {_written(key): _written(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_written(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _kinds(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def _read(kind: Any, value: Any) -> Any:
    """A value of JSON as the annotation ``kind`` has it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        some = [argument for argument in arguments if argument is not types.NoneType]
        return _read(some[0], value) if len(some) == 1 else value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{shown(value)} is no list")
        kinds = [arguments[0]] * len(value) if arguments[1:] == (Ellipsis,) else arguments
        return tuple(_read(one, item) for one, item in zip(kinds, value, strict=True))
    if origin is Mapping:
        return {_read(arguments[0], key): _read(arguments[1], item) for key, item in value.items()}
    if kind is float and value is None:
        return math.nan
    if kind is ThreatModel:
        return ThreatModel.named(value)
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_json(value)
    if kind in _SCALARS and not (isinstance(value, _SCALARS[kind]) and (kind is bool or not isinstance(value, bool))):
        raise TypeError(f"{shown(value)} is no {kind.__name__}")
    return value
