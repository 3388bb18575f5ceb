"""Models in messages: by what they are, and not by where they lie, which is no part of a result."""

from __future__ import annotations

from collections.abc import Mapping


def named(reason: str, names: Mapping[str, str]) -> str:
    """A reason with names in place of paths.

    Args:
        reason: why something could not be done.
        names: what lies at a path, by the path.
    """
    for path in sorted(names, key=len, reverse=True):  # one may begin as another does
        reason = reason.replace(path, names[path])
    return reason
