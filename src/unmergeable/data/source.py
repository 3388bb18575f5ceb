"""A place that gives examples: which ones, in which order, how many.

The part of an example depends on its content alone: two sources over one file that ask for different parts share no
example and no copy of one, whatever their seeds, and adding examples moves none from one part to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal, get_args

from unmergeable.data.example import Example
from unmergeable.data.formats import FORMATS, Format, find_format
from unmergeable.data.records import Fields, Records
from unmergeable.errors import BadInput, UsageError
from unmergeable.randomness import Stream

Part = Literal["train", "validation", "test"]

PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class DataSource:
    """Iterate over it for its examples, as often as needed: they are the same each time.

    Attributes:
        path: a local file or folder.
        format: one of ``FORMATS``; None to tell it from the path.
        fields: what the parts of an example are called in the file.
        part: only the examples of this part; None for all.
        fractions: of the examples in train, validation and test; they add up to 1.
        seed: of the order; None for the order of the file.
        limit: the most examples to give.
    """

    path: Path
    format: Format | None = None
    fields: Fields = field(default_factory=Fields)
    part: Part | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int | None = None
    limit: int | None = None

    def __iter__(self) -> Iterator[Example]:
        """The examples, each read when asked for.

        Raises:
            UsageError: a setting is out of range, or a reader is not installed.
            BadInput: the data cannot be read, or there is none to give.
        """
        self._validate()
        yield from self.select(FORMATS[self.format or find_format(self.path)](self.path, self.fields))

    def select(self, records: Records) -> Iterator[Example]:
        """What the source would give of these records, for what reads the path in its own way.

        Raises:
            UsageError: a setting is out of range.
            BadInput: a record cannot be read, or there is none to give.
        """
        self._validate()
        is_empty = True
        for example in islice(self._chosen(records), self.limit):
            is_empty = False
            yield example
        if is_empty:
            where = f" in its {self.part} part" if self.part and len(records) else ""
            raise BadInput(f"{self.path}: no examples{where}; give data that has some.")

    def _chosen(self, records: Records) -> Iterator[Example]:
        count = len(records)
        order = (
            range(count) if self.seed is None else Stream.from_seed(self.seed).child("data").permutations(1, count)[0]
        )
        for number in order:
            example = records[int(number)]
            if self.part is None or part_of(example, self.fractions) == self.part:
                yield example

    def _validate(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(f"no format of data is called {self.format!r}; known: {', '.join(FORMATS)}.")
        if self.part is not None and self.part not in PARTS:
            raise UsageError(f"no part of data is called {self.part!r}; known: {', '.join(PARTS)}.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit={self.limit}: at least one example is needed.")
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-9:
            raise UsageError(f"fractions={self.fractions}: must not be negative and must add up to 1.")


def part_of(example: Example, fractions: tuple[float, float, float]) -> Part:
    """The part an example belongs to, by its content."""
    place = int.from_bytes(example.digest()[:8], "big") / 2**64
    for part, end in zip(PARTS, accumulate(fractions), strict=True):
        if place < end:
            return part
    return PARTS[-1]  # rounding: the fractions may add up to less than 1 by a few epsilon
