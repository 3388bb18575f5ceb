"""``npz``: numpy arrays whose first axis counts the examples: ``text``, ``image``, or inputs of a network; ``label``.

The plural of a name is taken as well (``images``, ``labels``). Arrays of other names are inputs, passed on as they are
(``pixel_values``, ``input_ids`` with ``attention_mask``). The archive is read as a whole.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unmergeable.data.example import Content, Example
from unmergeable.data.images import array_pixels
from unmergeable.data.records import Fields, Records, make_example, reading, require_file
from unmergeable.errors import BadInput, shown

MAX_UNPACKED_BYTES = 200_000_000
MAX_RATIO = 100
"""An archive may be larger than the first in memory if it is not more than so many times larger than its file."""

Arrays = dict[str, npt.NDArray[Any]]


def open_arrays(path: Path, fields: Fields) -> Records:
    """The rows of the arrays in a file.

    Raises:
        BadInput: not an archive of arrays, or arrays of different lengths, or nothing but labels.
    """
    arrays = read_arrays(path)
    renamed = {f"{name}s": name for name in (fields.text, fields.image, fields.label)}
    arrays = {renamed.get(name, name): array for name, array in arrays.items()}
    lengths = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or -1 in lengths.values():
        raise BadInput(f"{path}: arrays of different lengths ({shown(lengths)}); the first axis counts the examples.")
    if not arrays.keys() - {fields.label}:
        raise BadInput(f"{path}: no array {fields.text!r}, {fields.image!r} or of network inputs; add one.")
    return _Rows(path, arrays, fields)


def read_arrays(path: Path) -> Arrays:
    """All arrays of a file, by name.

    Raises:
        BadInput: not an archive of arrays.
    """
    require_file(path)
    with reading(str(path), "not a readable archive of arrays", "write it with numpy.savez"):
        _require_unpackable(path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}


def _require_unpackable(path: Path) -> None:
    """Refuse a small file that unpacks to one that fills the memory."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_UNPACKED_BYTES and unpacked > MAX_RATIO * path.stat().st_size:
        raise BadInput(f"{path}: unpacks to {unpacked:,} bytes; write it uncompressed, with numpy.savez.")


class _Rows:
    def __init__(self, path: Path, arrays: Arrays, fields: Fields) -> None:
        self._path, self._arrays, self._fields = path, arrays, fields

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, number: int) -> Example:
        origin = f"{self._path}[{number}]"
        row = {name: array[number] for name, array in self._arrays.items()}
        label = row.pop(self._fields.label, None)
        content: Content
        if self._fields.text in row:
            content = str(row[self._fields.text])
        elif self._fields.image in row:
            content = array_pixels(row[self._fields.image], origin)
        else:
            content = {name: np.asarray(value) for name, value in row.items()}
        if label is not None and np.ndim(label):
            raise BadInput(f"{origin}: the label is an array {list(np.shape(label))}; a label is one number or name.")
        return make_example(content, None if label is None else label.item(), origin)
