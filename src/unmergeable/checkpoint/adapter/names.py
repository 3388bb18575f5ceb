"""From the names that an adapter's keys have to the names that its base's tensors have on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from unmergeable.checkpoint.adapter.skeleton import Skeleton
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError


class Names:
    """Names in memory against those on disk: equal, or off by one leading component, or as transformers renames them.

    A head model prefixes its backbone (``transformer.h.0``), a backbone saved alone does not (``h.0``), and the other
    way round. The network is built only for a name that is not found so. Where two towers have a tensor of this name,
    the one that the adapter was trained in is meant.

    Args:
        base: the checkpoint that the adapter belongs to.
        build: the network in which the adapter was trained.
        trained_part: what the base's configuration calls the part that the adapter was trained in, ``vision`` say;
            empty where it was the whole, or nobody knows.
    """

    def __init__(
        self, base: TensorSource, build: Callable[[], Skeleton], trained_part: Callable[[], str] = lambda: ""
    ) -> None:
        self._names = frozenset(base.names)
        self._roots = tuple(dict.fromkeys(name.partition(".")[0] for name in base.names))
        self._build = build
        self._trained_part = trained_part

    def match(self, name: str) -> str | None:
        """The base's tensor of this name in memory; None where it has none, or several could be meant."""
        found = self.find(name)
        if found is None and self.skeleton is not None and (renamed := self.skeleton.disk_name(name)):
            return self.find(renamed)
        return found

    def find(self, name: str) -> str | None:
        """The base's tensor of this name on disk, or of one that is off by its first component."""
        if name in self._names:
            return name
        candidates = {name.partition(".")[2], *(f"{root}.{name}" for root in self._roots)} & self._names
        if len(candidates) > 1 and self._part:
            candidates = {one for one in candidates if one.startswith(self._part)}
        return candidates.pop() if len(candidates) == 1 else None

    def on_disk(self, name: str) -> str:
        """The name a tensor that the base lacks gets on disk."""
        return (self.skeleton.disk_name(name) if self.skeleton is not None else None) or name

    @property
    def skeleton(self) -> Skeleton | None:
        """The network in which the adapter was trained; None where transformers cannot build it."""
        return self._attempt[0]

    @property
    def why_not(self) -> str:
        """Why there is no skeleton."""
        return self._attempt[1]

    @cached_property
    def _part(self) -> str:
        return self._trained_part()

    @cached_property
    def _attempt(self) -> tuple[Skeleton | None, str]:
        try:
            return self._build(), ""
        except (BadInput, UsageError) as error:
            return None, str(error)
