"""Progress on stderr: a bar on a terminal, a line now and then in a log. Work under two seconds shows nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from unmergeable.cli.quantity import BYTES, fitting_unit, in_unit
from unmergeable.progress import Progress

if TYPE_CHECKING:
    import rich.progress

BAR_AFTER_SECONDS = 2.0
LINE_EVERY_SECONDS = 10.0


@contextmanager
def progress_display(stream: TextIO) -> Iterator[Progress]:
    """The progress callback that suits ``stream``. A bar is taken away at the end."""
    if not stream.isatty():
        yield ProgressLines(stream)
        return
    bar = ProgressBar(stream)
    bar.start()
    try:
        yield bar
    finally:
        bar.stop()


class ProgressLines:
    """Writes a line at most every ``seconds``, the first one after as long."""

    def __init__(
        self, stream: TextIO, *, seconds: float = LINE_EVERY_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._seconds = seconds
        self._clock = clock
        self._written = clock()

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        now = self._clock()
        if now - self._written >= self._seconds:
            self._written = now
            print(f"{stage}: {describe_amount(done, total, unit)}", file=self._stream, flush=True)


class ProgressBar:
    """One bar, for the latest stage. It appears by itself, so that work which reports nothing at first is seen too."""

    def __init__(self, stream: TextIO, *, seconds: float = BAR_AFTER_SECONDS) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._latest: tuple[str, int, int, str] = ("starting", 0, 0, "")
        self._stage = ""
        self._bar: rich.progress.Progress | None = None
        self._is_stopped = False
        self._timer = threading.Timer(seconds, self._show)
        self._timer.daemon = True

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        with self._lock:
            self._latest = (stage, done, total, unit)
            self._update()

    def start(self) -> None:
        """Begin to count the seconds after which the bar appears."""
        self._timer.start()

    def stop(self) -> None:
        """Take the bar away, or never show it."""
        self._timer.cancel()
        with self._lock:
            self._is_stopped = True
            if self._bar is not None:
                self._bar.stop()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        # stdout is left alone: the result goes there, possibly into a pipe.
        bar = Progress(*columns, console=Console(file=self._stream), transient=True, redirect_stdout=False)
        with self._lock:
            if not self._is_stopped:
                self._bar = bar
                self._bar.add_task("", total=None, amount="")
                self._update()
                self._bar.start()

    def _update(self) -> None:
        if self._bar is None or self._is_stopped:
            return
        stage, done, total, unit = self._latest
        task = self._bar.task_ids[0]
        if stage != self._stage:
            self._stage = stage
            self._bar.reset(task)  # the speed of one stage says nothing about the next
        amount = describe_amount(done, total, unit)
        self._bar.update(task, description=stage, completed=done, total=total or None, amount=amount)


def describe_amount(done: int, total: int, unit: str) -> str:
    """``"3.1 of 16.0 GB (19 %)"``; empty where the total is not known."""
    if total <= 0:
        return ""
    percent = 100 * done // total
    if unit != "bytes":
        return f"{done} of {total} {unit} ({percent} %)"
    scale = fitting_unit(total, BYTES)
    return f"{in_unit(done, scale, BYTES)} of {in_unit(total, scale, BYTES)} {scale} ({percent} %)"
