"""``parquet``: a file of columns, as hubs keep data sets. Rows hold ``text`` or ``image``, and perhaps ``label``.

An image is a column of objects with the ``bytes`` of an image file. The file is read as a whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmergeable.data.columns import Columns
from unmergeable.data.records import Fields, Records, reading, require_file
from unmergeable.errors import UsageError


def open_records(path: Path, fields: Fields) -> Records:
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
    return Columns(path, _Rows(table), fields)


class _Rows:
    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        rows: int = self._table.num_rows
        return rows

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._table.slice(number, 1).to_pylist()[0]
        return row
