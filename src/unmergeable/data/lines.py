"""A text file by its lines, of which only the places are held."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unmergeable.data.records import require_file
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
