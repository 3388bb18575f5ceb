"""``text``: a file with an example on each line; blank lines are skipped."""

from __future__ import annotations

from pathlib import Path

from unmergeable.data.example import Example
from unmergeable.data.lines import Lines
from unmergeable.data.records import Fields, Records, make_example


def open_records(path: Path, fields: Fields) -> Records:
    """The lines of a file. Raises BadInput when it is none."""
    return _TextLines(Lines(path))


class _TextLines:
    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Example:
        return make_example(self._lines[number], None, self._lines.origin(number))
