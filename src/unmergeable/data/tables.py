"""Tables with named columns: ``text`` or ``image``, perhaps ``label``, and whatever else a use asks for.

``parquet``: a file, as hubs keep data sets, which is read as a whole. ``saved``: a folder that ``datasets`` wrote with
``save_to_disk``. An image is a PIL image, or an object with the ``bytes`` of an image file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from unmergeable.data.example import Example, Image
from unmergeable.data.images import as_pixels, image_of_bytes
from unmergeable.data.records import Fields, Records, make_example, reading, require_field, require_file
from unmergeable.errors import BadInput, UsageError

_SEVERAL = "dataset_dict.json"
_MARKERS = (_SEVERAL, "state.json")


def open_parquet(path: Path, fields: Fields) -> Records:
    """The rows of a file.

    Raises:
        UsageError: ``pyarrow`` is not installed.
        BadInput: it is no parquet file.
    """
    require_file(path)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError("pyarrow is not installed; pip install pyarrow") from None
    with reading(str(path), "not a readable parquet file", "write it again"):
        table = parquet.read_table(path)
    return _Columns(path, _ParquetRows(table), fields)


def is_saved(path: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` writes."""
    return any((path / marker).is_file() for marker in _MARKERS)


def open_saved(path: Path, fields: Fields) -> Records:
    """The rows of a data set, memory-mapped.

    Raises:
        UsageError: ``datasets`` is not installed.
        BadInput: not such a folder; or one that holds several data sets.
    """
    if not is_saved(path):
        raise BadInput(f"{path} was not written by save_to_disk; give such a folder.")
    if (path / _SEVERAL).is_file():
        inner = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise BadInput(f"{path} holds several data sets; give one of them: {', '.join(str(path / n) for n in inner)}.")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError("datasets is not installed; pip install datasets") from None
    with reading(str(path), "not readable as a data set", "write it again"):
        rows = datasets.load_from_disk(str(path))
    return _Columns(path, rows, fields)


class _ParquetRows:
    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        rows: int = self._table.num_rows
        return rows

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._table.slice(number, 1).to_pylist()[0]
        return row


class _Table(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Mapping[str, Any]: ...


class _Columns:
    def __init__(self, path: Path, table: _Table, fields: Fields) -> None:
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
