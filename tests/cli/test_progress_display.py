"""Progress is seen where somebody waits, stays out of the way elsewhere, and leaves nothing behind."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest

from unmergeable.cli.progress_display import ProgressBar, ProgressLines, describe_amount, progress_display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ((3_100_000_000, 16_000_000_000, "bytes"), "3.1 of 16.0 GB (19 %)"),
        ((0, 2_000_000, "bytes"), "0.0 of 2.0 MB (0 %)"),
        ((500, 999, "bytes"), "500 of 999 bytes (50 %)"),
        ((7, 20, "steps"), "7 of 20 steps (35 %)"),
        ((20, 20, "steps"), "20 of 20 steps (100 %)"),
        ((5, 0, "bytes"), ""),
    ],
)
def test_amounts_are_readable(amount: tuple[int, int, str], text: str) -> None:
    assert describe_amount(*amount) == text


def test_a_log_gets_a_line_now_and_then() -> None:
    seconds, stream = [0.0], io.StringIO()
    lines = ProgressLines(stream, seconds=10, clock=lambda: seconds[0])

    for second in range(31):
        seconds[0] = second
        lines("writing", second, 30, "steps")

    assert stream.getvalue().splitlines() == [
        "writing: 10 of 30 steps (33 %)",
        "writing: 20 of 30 steps (66 %)",
        "writing: 30 of 30 steps (100 %)",
    ]


def test_short_work_shows_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        with progress_display(stream) as progress:
            progress("writing", 1, 2, "bytes")
        assert stream.getvalue() == ""


def test_the_bar_appears_even_when_nothing_reports() -> None:
    stream = Terminal()
    bar = ProgressBar(stream, seconds=0)
    bar.start()
    try:
        assert wait_for(lambda: "starting" in stream.getvalue())
    finally:
        bar.stop()


def test_the_bar_follows_the_stages_and_goes_away() -> None:
    stream = Terminal()
    bar = ProgressBar(stream, seconds=0)
    bar.start()
    try:
        assert wait_for(lambda: bool(stream.getvalue()))
        bar("writing", 1, 4, "tensors")
        assert wait_for(lambda: "1 of 4 tensors (25 %)" in stream.getvalue())
        bar("verifying", 3, 3, "blocks")
        assert wait_for(lambda: "3 of 3 blocks (100 %)" in stream.getvalue())
    finally:
        bar.stop()
    shown = stream.getvalue()

    assert shown.endswith("\x1b[2K"), "the last thing written clears the line"
    bar("verifying", 3, 3, "blocks")
    assert stream.getvalue() == shown, "nothing comes after the end"
