"""Methods by name: those of this package, and those that other packages bring along.

Another package adds a method in one of two ways. At run time, with a decorator:

    @unmergeable.register_protection
    @dataclass(frozen=True)
    class Mine: ...

or for good, by announcing the class in its own ``pyproject.toml``, so that it is known wherever it is installed:

    [project.entry-points."unmergeable.protections"]
    mine = "my_package:Mine"
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from unmergeable.errors import UsageError
from unmergeable.settings import nearest

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=type[Any])


@dataclass(frozen=True)
class Requirements:
    """What a method with given settings needs, and what it promises.

    Attributes:
        exact: the result computes the same function, up to rounding.
        needs: what has to be given beside the checkpoint: "base", "data", "key", "siblings", "sources", ...
        accepts: what else is of use when it is given.
    """

    exact: bool = False
    needs: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()

    @property
    def reads(self) -> frozenset[str]:
        """Everything that the method has a use for."""
        return frozenset(self.needs + self.accepts)


class Registry(Mapping[str, Any]):
    """Classes of methods by their names, this package's own first.

    Those of other packages are looked for when a name is not among the others, or when all are asked for. One that
    cannot be imported is left out with a warning, and is an error only for who asks for it.
    """

    def __init__(self, kind: str, group: str, own: Iterable[type[Any]]) -> None:
        """``kind``: the word for one of them in messages. ``group``: of the entry points of other packages."""
        self.kind = kind
        self.group = group
        self._known: dict[str, type[Any]] = {cls.name: cls for cls in own}
        self._broken: dict[str, str] = {}
        self._has_looked = False

    def register(self, method: Method) -> Method:
        """Add a class under its ``name``; returns it, to be used as a decorator.

        Raises:
            UsageError: it has no name, or one that is taken by another class.
        """
        name = getattr(method, "name", None)
        if not isinstance(name, str) or not name:
            raise UsageError(f"{method.__qualname__} has no name: give the class name = '...' to be called by.")
        taken = self._known.get(name)
        if taken is not None and taken is not method:
            raise UsageError(
                f"a {self.kind} called {name!r} exists ({taken.__module__}.{taken.__qualname__}): choose another name."
            )
        self._known[name] = method
        return method

    def require(self, name: str) -> Any:
        """The class called ``name``.

        Raises:
            UsageError: there is none, with the nearest name; or its package cannot be imported, with the reason.
        """
        if name in self:
            return self[name]
        if name in self._broken:
            reason = self._broken[name]
            raise UsageError(f"{self.kind} {name!r} cannot be used ({reason}); repair or uninstall its package.")
        raise UsageError(f"no {self.kind} is called {name!r}{nearest(name, self)}")

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._look()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        self._look()
        return iter(tuple(self._known))

    def __len__(self) -> int:
        self._look()
        return len(self._known)

    def _look(self) -> None:
        if self._has_looked:
            return
        self._has_looked = True
        for point in importlib.metadata.entry_points(group=self.group):
            try:
                self.register(point.load())
            except Exception as error:  # whatever a stranger's module raises, the others stay usable
                reason = str(error) or type(error).__name__
                self._broken[point.name] = reason
                logger.warning("%s %r of another package is left out: %s", self.kind, point.name, reason)
