"""How long work reports itself: a callback, which the command line turns into a bar."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how much of it is done, and how much there is.

    ``done`` and ``total`` share one unit (bytes, steps, cells …) named by ``unit``. Calls may come from
    worker threads, but never two at once.
    """

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None: ...


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """The default: report nothing."""
