"""Reading a YAML document entry by entry, so that every complaint says where, what and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from unmergeable.checkpoint.hub import is_on_hub
from unmergeable.errors import BadInput, shown
from unmergeable.settings import nearest
from unmergeable.yaml_text import parse_yaml

Value = TypeVar("Value")

MOST_ENTRIES = 100_000
"""Of a document, counted where they are used: a few bytes of YAML can repeat each other without end."""

_OF_TEXTS = ("must be a text", "must be a list of names")


class Entry:
    """A mapping in a document whose keys are all known; ``where`` names it in messages.

    Raises:
        BadInput: not a mapping, or a key that is not in ``known`` (the nearest one is given).
    """

    def __init__(self, document: object, known: Sequence[str], where: str) -> None:
        self.where = where
        if not isinstance(document, Mapping):
            raise BadInput(f"{where}: a mapping is wanted, with {', '.join(known)}.")
        for key in document:
            if key not in known:
                raise BadInput(f"{where} has no entry {key!r}{nearest(str(key), dict.fromkeys(known))}")
        self._document = document

    def __contains__(self, key: str) -> bool:
        return self._document.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """A string; BadInput when it is missing without a default, or something else."""
        value = self._get(key, default)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "must be a text", value)
        return value

    def name(self, key: str = "name", default: str | None = None) -> str:
        """A text that results, pages and messages call something by: one line that can be printed."""
        value = self.text(key, default)
        if not value.isprintable():
            raise self.wrong(key, "must be one line of printable characters", value)
        return value

    def path(self, key: str, folder: Path) -> Path:
        """A path, relative to ``folder``, at which there is something."""
        return self._existing(key, folder / self.text(key))

    def checkpoint(self, key: str, folder: Path) -> Path:
        """A path as :meth:`path`, or the name of a checkpoint on the hub as it stands."""
        return self._checkpoint(key, self.text(key), folder)

    def checkpoints(self, key: str, folder: Path) -> tuple[Path, ...]:
        """A list of what :meth:`checkpoint` gives, empty when it is missing."""
        return tuple(self._checkpoint(key, text, folder) for text in self.texts(key))

    def _checkpoint(self, key: str, text: str, folder: Path) -> Path:
        return Path(text) if is_on_hub(text) else self._existing(key, folder / text)

    def _existing(self, key: str, path: Path) -> Path:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise BadInput(
                f"{self.where}, {key}: {path} does not exist; correct the path, or make what lies there."
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{self.where}, {key}: {shown(str(path))} cannot be read ({reason}).") from None
        return path

    def whole(self, key: str, default: int, *, least: int = 1) -> int:
        """A whole number of at least ``least``."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(key, f"must be a whole number of at least {least}", value)
        return value

    def number(self, key: str) -> float:
        value = self._get(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise self.wrong(key, "must be a number", value)
        return float(value)

    def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
        """Different numbers in rising order."""
        value = self._get(key, list(default))
        is_numbers = isinstance(value, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in value
        )
        if not is_numbers or not value or any(v != v or abs(v) == float("inf") for v in value):
            raise self.wrong(key, "must be a list of numbers", value)
        return tuple(sorted({float(v) for v in value}))

    def texts(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        value = self._get(key, list(default))
        if not isinstance(value, list):
            raise self.wrong(key, "must be a list of names", value)
        for item in value:
            if not isinstance(item, str):
                raise self.wrong(key, "must be a list of names", item)
        return tuple(value)

    def flag(self, key: str) -> bool:
        """True or false; false when it is missing."""
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false", value)
        return value

    def listed(
        self, key: str, read: Callable[[object, str], Value], *, default: Sequence[object] | None = None
    ) -> tuple[Value, ...]:
        """A list, each item read by ``read(item, where)``; empty only if that is the default."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or (not value and default is None):
            raise self.wrong(key, "must be a list of at least one", value)
        return tuple(read(item, f"{self.where}, {key} {number}") for number, item in enumerate(value, start=1))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A mapping of names, empty when it is missing."""
        value = self._get(key, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "must be a mapping of names to values", value)
        return value

    def document(self, key: str, default: object = None) -> object:
        """What stands there, unread."""
        return self._get(key, default)

    def wrong(self, key: str, what: str, value: object) -> BadInput:
        """The error for a value that cannot be used."""
        if value is None:
            return BadInput(f"{self.where}: {key} is missing.")
        is_bare = isinstance(value, bool | int | float) and what in _OF_TEXTS
        return BadInput(f"{self.where}, {key}: {what}, not {shown(value)}{'; put it in quotes' if is_bare else ''}.")

    def _get(self, key: str, default: object) -> Any:
        value = self._document.get(key)
        return default if value is None else value


def read_document(path: Path, guide: str) -> object:
    """What a YAML file holds; ``guide`` is the page that explains such files.

    Raises:
        BadInput: it cannot be read, or is no YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), f"{path} (a plan, {guide})")
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); give a plan in YAML.") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not YAML ({error}); see {guide} for a plan.") from None


def require_plain(document: object, where: str) -> None:
    """Raises BadInput unless a document holds what JSON has as well: it stands in the result as it was written.

    YAML makes dates and numbers of texts that look like them, and has tags for more.
    """
    _require_plain(document, where, {}, set())


def _require_plain(value: object, where: str, sizes: dict[int, int], around: set[int]) -> int:
    """How many entries a value has. ``sizes``: of what was seen already; ``around``: what the value lies in."""
    if isinstance(value, float) and not isfinite(value):
        raise BadInput(f"{where}: {value} is no number that can be used; give a finite one.")
    if value is None or isinstance(value, str | int | float):
        return 1
    if not isinstance(value, Mapping | list | tuple):
        raise BadInput(f"{where}: {value} is a {type(value).__name__} to YAML; put it in quotes.")
    if id(value) in around:
        raise BadInput(f"{where}: it contains itself; write out what is meant.")
    if id(value) not in sizes:
        around.add(id(value))
        sizes[id(value)] = 1 + sum(_require_plain(item, place, sizes, around) for place, item in _items(value, where))
        around.remove(id(value))
    if sizes[id(value)] > MOST_ENTRIES:
        raise BadInput(f"{where}: more than {MOST_ENTRIES} entries; a plan has a few dozen.")
    return sizes[id(value)]


def _items(value: Mapping[object, object] | Sequence[object], where: str) -> Iterable[tuple[str, object]]:
    """What a mapping or a list holds, each with what it is called in messages."""
    if not isinstance(value, Mapping):
        return ((f"{where} {number}", item) for number, item in enumerate(value, start=1))
    for key in value:
        if not isinstance(key, str):
            raise BadInput(f"{where}: the name {key} is a {type(key).__name__} to YAML; put it in quotes.")
    return ((f"{where}, {key}", item) for key, item in value.items())


def require_named(name: str, known: Iterable[str], what: str, where: str) -> None:
    """Raises BadInput with the nearest name unless ``name`` is one of those that are ``known``."""
    if name not in known:
        raise BadInput(f"{where}: no {what} is called {name!r}{nearest(name, dict.fromkeys(known))}")


def require_unique(names: Sequence[str], where: str) -> None:
    """Raises BadInput naming the first name that is there twice."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise BadInput(f"{where}: {name!r} is there twice; names must differ.")
