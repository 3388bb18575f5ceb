"""Which format a path holds, and the readers of all of them.

==========  ===========================================  ============================================================
format      path                                         an example is
==========  ===========================================  ============================================================
``jsonl``   ``*.jsonl``, ``*.ndjson``                    a line: an object with ``text`` or ``image`` (a path)
``text``    ``*.txt``                                    a line that is not blank
``images``  a folder of images or of folders of images   an image; the folder it lies in is its label
``npz``     ``*.npz``                                    a row of ``text``, ``image`` or network inputs, and ``label``
``parquet`` ``*.parquet``                                a row, with the columns of ``jsonl``
``saved``   a folder written by ``save_to_disk``         a row, with the columns of ``jsonl``
==========  ===========================================  ============================================================

Objects and rows may also hold a ``label``. :class:`Fields` has other names for the three.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from unmergeable.data.images import ImageFiles
from unmergeable.data.lines import JSONLines, TextLines
from unmergeable.data.numpy_archive import open_arrays
from unmergeable.data.records import Fields, Records
from unmergeable.data.tables import is_saved, open_parquet, open_saved
from unmergeable.errors import BadInput

Format = Literal["jsonl", "text", "images", "npz", "parquet", "saved"]

FORMATS: dict[Format, Callable[[Path, Fields], Records]] = {
    "jsonl": JSONLines,
    "text": TextLines,
    "images": ImageFiles,
    "npz": open_arrays,
    "parquet": open_parquet,
    "saved": open_saved,
}
"""What opens each format."""

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".npz": "npz",
    ".parquet": "parquet",
}


def find_format(path: Path) -> Format:
    """The format of what lies at ``path``.

    Raises:
        BadInput: nothing lies there, or nothing that is known.
    """
    if not path.exists():
        raise BadInput(
            f"{path} does not exist; data are read from local files: download a hub's data set and write it with "
            "save_to_disk."
        )
    if path.is_dir():
        return "saved" if is_saved(path) else "images"
    if path.suffix.lower() not in _SUFFIXES:
        raise BadInput(f"{path}: not a known format of data; use {', '.join(_SUFFIXES)}, or a folder.")
    return _SUFFIXES[path.suffix.lower()]
