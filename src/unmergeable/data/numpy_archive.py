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
from unmergeable.data.records import Fields, Records, make_example, require_file
from unmergeable.errors import BadInput

Arrays = dict[str, npt.NDArray[Any]]


def open_records(path: Path, fields: Fields) -> Records:
    """The rows of the arrays in a file.

    Raises:
        BadInput: not an archive of arrays, or arrays of different lengths, or nothing but labels.
    """
    require_file(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(f"{path}: not a readable archive of arrays ({reason}); write it with numpy.savez.") from None
    renamed = {f"{name}s": name for name in (fields.text, fields.image, fields.label)}
    arrays = {renamed.get(name, name): array for name, array in arrays.items()}
    lengths = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or -1 in lengths.values():
        raise BadInput(f"{path}: arrays of different lengths ({lengths}); the first axis counts the examples.")
    if not arrays.keys() - {fields.label}:
        raise BadInput(f"{path}: no array {fields.text!r}, {fields.image!r} or of network inputs; add one.")
    return _Rows(path, arrays, fields)


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
        return make_example(content, None if label is None else label.item(), origin)
