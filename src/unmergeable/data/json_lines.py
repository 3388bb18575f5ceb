"""``jsonl``: a JSON object on each line, with the text or the path of an image, and perhaps a label."""

from __future__ import annotations

import json
from pathlib import Path

from unmergeable.data.example import Content, Example
from unmergeable.data.images import read_image
from unmergeable.data.lines import Lines
from unmergeable.data.records import Fields, Records, make_example, require_field
from unmergeable.errors import BadInput


def open_records(path: Path, fields: Fields) -> Records:
    """The objects of a file. Paths of images start at its folder. Raises BadInput when it is no file."""
    return _Objects(Lines(path), fields)


class _Objects:
    def __init__(self, lines: Lines, fields: Fields) -> None:
        self._lines, self._fields = lines, fields

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
