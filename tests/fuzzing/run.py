"""Give every reader changed files, and count what comes of it.

    python -m fuzzing.run FOLDER [--target NAME …] [--cases N] [--seed N] [--json FILE]

A reader gives a result or an error of this package with one bounded line, within 5 seconds of a processor and 500 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.targets import TARGETS, Target, prepare
from unmergeable.cli.failure import failure_of
from unmergeable.errors import UnmergeableError

SECONDS, BYTES = 5, 500_000_000
WAITING = 60
"""Seconds by the clock, for what waits and takes no processor."""

MAX_LINE = 4100


class TooLong(BaseException):
    """A reader took longer than SECONDS."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*arguments: Any) -> None:
        raise TooLong

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WAITING))
    for timer, sent, seconds in timers:
        signal.signal(sent, stop)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)


def outcome(target: Target, folder: Path) -> str:
    """``read``, ``refused``, or what is wrong."""
    before = _peak()
    try:
        with limited(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder)
    except UnmergeableError as error:
        failure = failure_of(error)
        if len(failure.message) > MAX_LINE or failure.exit_code not in (1, 2, 3, 4, 5):
            return f"message of {len(failure.message)} characters"
        result = "refused"
    except TooLong:
        return "took too long"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in place if "unmergeable" in frame.filename]
        return f"internal error: {type(error).__name__}: {str(error)[:150]} ({' '.join(ours[-2:])})"
    else:
        result = "read"
    return f"took {_peak() - before:,} bytes" if _peak() - before > BYTES else result


def _peak() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def fuzz(name: str, folder: Path, cases: int, seed: int) -> tuple[Counter[str], dict[str, int]]:
    """Outcomes of one target, and the numbers of cases with an example of everything that is wrong."""
    target, counts, examples = TARGETS[name], Counter[str](), dict[str, int]()
    file = folder / target.file
    valid = file.read_bytes()
    assert outcome(target, folder) == "read", f"{name}: the valid file is not read: {outcome(target, folder)}"
    for number in range(cases):
        file.write_bytes(case(name, valid, seed + number))
        found = outcome(target, folder)
        counts[found] += 1
        if found not in ("read", "refused"):
            examples.setdefault(found, seed + number)
    file.write_bytes(valid)
    return counts, examples


def case(name: str, valid: bytes, number: int) -> bytes:
    """The changed file of a number, always the same."""
    return TARGETS[name].mutate(valid, Random(f"{name} {number}"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--cases", type=int, default=850)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def report(given: argparse.Namespace) -> dict[str, Any]:
    """Counts by format."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    given.folder.mkdir(parents=True, exist_ok=True)
    prepare(given.folder)
    found: dict[str, Any] = {}
    for name in given.target or TARGETS:
        counts, examples = fuzz(name, given.folder, given.cases, given.seed)
        wrong = {what: {"cases": counts[what], "first": number} for what, number in examples.items()}
        found[name] = {"cases": given.cases, "read": counts["read"], "refused": counts["refused"], "wrong": wrong}
        print(name, json.dumps(found[name], indent=1), file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    arguments = parse()
    result = report(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(entry["wrong"] for entry in result.values()))
