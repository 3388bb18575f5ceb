"""What a reader of one format offers: how many examples there are, and any one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unmergeable.data.example import Content, Example
from unmergeable.errors import BadInput


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
    raise BadInput(
        f"{origin}: no field {fields.text!r} or {fields.image!r}; it has {', '.join(map(repr, row)) or 'none'}."
    )


def make_example(content: Content, label: Any, origin: str, record: Mapping[str, Any] | None = None) -> Example:
    """An example whose label is what labels may be. ``record`` is what it was read from, where there is more to it.

    Raises:
        BadInput: the label is neither a whole number nor a name, or the text is empty.
    """
    if isinstance(content, str) and not content.strip():
        raise BadInput(f"{origin}: the text is empty; leave that example out.")
    if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
        raise BadInput(f"{origin}: the label is {label!r}; a label is a class number or a class name.")
    return Example(content, label, origin, record or {})


def require_file(path: Path) -> None:
    """Raise BadInput unless ``path`` is a file."""
    if not path.is_file():
        raise BadInput(f"{path} is not a file; give the path of the data.")
