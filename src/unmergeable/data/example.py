"""One example: a text, an image or ready inputs; perhaps its label; and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from unmergeable.errors import BadInput

Image = npt.NDArray[np.uint8]
"""Red, green and blue, [height, width, 3]."""

Prepared = Mapping[str, npt.NDArray[Any]]
"""Inputs of a network by name, without the axis of the batch."""

Content = str | Image | Prepared


@dataclass(frozen=True, eq=False)
class Example:
    """``label`` is a class number or a class name, None where there is none. ``origin`` names it in messages.

    ``record`` is the whole object or row it was read from, for what asks for more than content and label; empty where
    the format has no such thing.
    """

    content: Content
    label: int | str | None
    origin: str
    record: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> bytes:
        """16 bytes that depend on the content alone: copies of an example share them, whatever their labels."""
        digest = hashlib.blake2b(digest_size=16, person=b"example")
        if isinstance(self.content, str):
            digest.update(self.content.encode())
        elif isinstance(self.content, np.ndarray):
            _update(digest, "", self.content)
        else:
            for name, array in sorted(self.content.items()):
                _update(digest, name, array)
        return digest.digest()


def _update(digest: hashlib.blake2b, name: str, array: npt.NDArray[Any]) -> None:
    digest.update(repr((name, array.shape, array.dtype.str)).encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def class_number(example: Example, class_names: Sequence[str]) -> int:
    """The number of the example's class, by its name or by itself.

    A label of digits that names no class is a number: folders of images can only be called "7".

    Raises:
        BadInput: it has no label, or one that is none of these classes.
    """
    label = example.label
    if label is None:
        raise BadInput(f"{example.origin}: no label; this use of the data needs one for every example.")
    if isinstance(label, str):
        if label in class_names:
            return list(class_names).index(label)
        if not label.isdecimal():
            raise BadInput(
                f"{example.origin}: the label {label!r} is none of the network's classes "
                f"({', '.join(class_names[:5])}{', …' if len(class_names) > 5 else ''}); use their names or numbers."
            )
    number = int(label)
    if not 0 <= number < len(class_names):
        raise BadInput(
            f"{example.origin}: label {number} is out of range; the network has classes 0 to {len(class_names) - 1}."
        )
    return number
