"""Rows of a table with named columns: ``text`` or ``image``, perhaps ``label``, and whatever else a use asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from unmergeable.data.example import Example, Image
from unmergeable.data.images import as_pixels, image_of_bytes
from unmergeable.data.records import Fields, make_example, reading, require_field
from unmergeable.errors import BadInput


class Table(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Mapping[str, Any]: ...


class Columns:
    """The rows of a table as examples. An image is a PIL image, or an object with the ``bytes`` of a file."""

    def __init__(self, path: Path, table: Table, fields: Fields) -> None:
        self._path, self._table, self._fields = path, table, fields

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> Example:
        origin = f"{self._path}[{number}]"
        with reading(origin, "not a readable row", "write the data again"):
            row = self._table[number]
        name = require_field(row, self._fields, origin)
        value = row[name]
        label = row.get(self._fields.label)
        if name == self._fields.text and isinstance(value, str):
            return make_example(value, label, origin, row)
        image = _image(value, origin) if name == self._fields.image else None
        if image is None:
            raise BadInput(f"{origin}: {name!r} is {type(value).__name__}; it must be text or an image.")
        return make_example(image, label, origin, row)


def _image(value: Any, origin: str) -> Image | None:
    if hasattr(value, "convert"):
        return as_pixels(value)
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return image_of_bytes(value["bytes"], origin)
    return None
