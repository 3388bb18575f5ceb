"""What a reader of one format offers: how many examples there are, and any one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from unmergeable.data.example import Content, Example
from unmergeable.errors import BadInput, UnmergeableError, shown


@dataclass(frozen=True)
class Fields:
    """The names that the parts of an example have in a file."""

    text: str = "text"
    image: str = "image"
    label: str = "label"


class Records(Protocol):
    """Examples by number, each read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Example:
        """Raises BadInput when it cannot be read, naming where it is."""
        ...


def require_field(row: Mapping[str, Any], fields: Fields, origin: str) -> str:
    """The name of the field that holds the content of a row: its text, or else its image.

    Raises:
        BadInput: it holds neither.
    """
    for name in (fields.text, fields.image):
        if row.get(name) is not None:
            return name
    there = ", ".join(map(shown, islice(row, 10))) or "none"
    raise BadInput(f"{origin}: no field {fields.text!r} or {fields.image!r}; it has {there}.")


def make_example(content: Content, label: Any, origin: str, record: Mapping[str, Any] | None = None) -> Example:
    """An example whose label is what labels may be. ``record`` is what it was read from, where there is more to it.

    Raises:
        BadInput: the label is neither a whole number nor a name, or the text is empty.
    """
    if isinstance(content, str):
        if not content.strip():
            raise BadInput(f"{origin}: the text is empty; leave that example out.")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise BadInput(f"{origin}: the text holds half a character (a lone surrogate); repair it.")
    if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
        raise BadInput(f"{origin}: the label is {shown(label)}; a label is a class number or a class name.")
    return Example(content, label, origin, record or {})


@contextmanager
def reading(origin: str, problem: str, remedy: str) -> Iterator[None]:
    """Around a library's reader of one format: whatever a damaged file makes it raise becomes one line.

    Raises:
        BadInput: naming the file, the problem, its reason and the remedy.
    """
    try:
        yield
    except UnmergeableError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise BadInput(f"{origin}: {problem} ({reason}); {remedy}.") from error


def require_file(path: Path) -> None:
    """Raise BadInput unless ``path`` is a file."""
    if not path.is_file():
        raise BadInput(f"{path} is not a file; give the path of the data.")
