"""Files with an example on each line, of which only the places are held.

``text``: each line that is not blank. ``jsonl``: a JSON object with the text or the path of an image, perhaps a label.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unmergeable.data.example import Content, Example
from unmergeable.data.images import read_image
from unmergeable.data.records import Fields, make_example, require_field, require_file
from unmergeable.errors import BadInput

MAX_LINE_BYTES = 1 << 26


class Lines:
    """The lines of a UTF-8 file that are not blank, any of them at a time. Sixteen bytes per line are held."""

    def __init__(self, path: Path) -> None:
        require_file(path)
        self.path = path
        places: list[int] = []
        numbers: list[int] = []
        place = 0
        with path.open("rb") as file:
            # Never more than one line in memory, and of a file without line ends only the beginning.
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise BadInput(f"{path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes; split it.")
                if line.strip():
                    places.append(place)
                    numbers.append(number)
                place += len(line)
        self._places: npt.NDArray[np.int64] = np.array(places, dtype=np.int64)
        self._numbers: npt.NDArray[np.int64] = np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def origin(self, number: int) -> str:
        """Where a line stands, for messages."""
        return f"{self.path}:{self._numbers[number]}"

    def __getitem__(self, number: int) -> str:
        """The line without its end.

        Raises:
            BadInput: it is not UTF-8.
        """
        with self.path.open("rb") as file:
            file.seek(int(self._places[number]))
            line = file.readline()
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise BadInput(f"{self.origin(number)}: not UTF-8 text; convert the file.") from None


class TextLines:
    """The lines of a file as examples; BadInput when it is none."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self._lines = Lines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Example:
        return make_example(self._lines[number], None, self._lines.origin(number))


class JSONLines:
    """The objects of a file as examples; BadInput when it is none. Paths of images start at its folder."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self._lines, self._fields = Lines(path), fields

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Example:
        origin = self._lines.origin(number)
        try:
            row = json.loads(self._lines[number])
        except (ValueError, RecursionError) as error:  # also numbers of too many digits, and nesting without end
            reason = getattr(error, "msg", str(error))
            raise BadInput(f"{origin}: not JSON ({reason}); each line must be one object.") from None
        if not isinstance(row, dict):
            raise BadInput(f"{origin}: not a JSON object; each line must be one.")
        name = require_field(row, self._fields, origin)
        value = row[name]
        if not isinstance(value, str):
            raise BadInput(f"{origin}: {name!r} is {type(value).__name__}, not a string.")
        content: Content = value if name == self._fields.text else read_image(self._lines.path.parent / value)
        return make_example(content, row.get(self._fields.label), origin, row)
