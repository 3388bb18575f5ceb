"""An untrusted program in a process of its own, with as little around it as the system allows.

==============  ==========================================================================================
always          limits of processor time, memory, size of files and number of processes; a wall clock; an
                environment without the user's; a folder of its own; no privileges (root becomes nobody)
``network``     a network namespace without devices: no connection to anything, this machine included
``processes``   a namespace of processes and shared memory: it sees no other process and cannot signal one, and
                whatever it started ends with it
``files``       a namespace of mounts, all read-only; its folder is in memory, of bounded size; ``/proc`` and
                ``/run`` are empty
==============  ==========================================================================================

The last three need Linux 5.12 and the right to make namespaces (root, or user namespaces that are not switched off, as
many containers do). What is **not** isolated: the program reads every file that the user can read, uses the processor
within its limits, and meets the same kernel, so a hole in the kernel is a way out. It shares its process with what runs
it, so one that looks for the way can claim to have ended well. Without ``processes`` a process that
leaves its group outlives the program until its processor time is up. To run code that may be hostile use a virtual
machine that holds no secrets.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from unmergeable.errors import UsageError
from unmergeable.tasks.sandbox_child import FULL_ISOLATION

Isolation = Literal["required", "where_allowed", "none"]
"""Of namespaces: all of them or no program is run; those that the system allows; or none."""

_CHILD = Path(__file__).with_name("sandbox_child.py")

_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one program may use. ``seconds`` bound its processor time and, twice as many, the clock on the wall."""

    seconds: float = 10.0
    memory_megabytes: int = 1024
    file_megabytes: int = 16
    processes: int = 16

    def validate(self) -> None:
        """Raises UsageError for a limit that leaves no room."""
        if min(self.seconds, self.memory_megabytes, self.file_megabytes, self.processes) < 1:
            raise UsageError(f"{self}: every limit must be at least 1.")


@dataclass(frozen=True)
class Outcome:
    """Whether the program ran to its end without an error, and which parts of :data:`FULL_ISOLATION` were active."""

    has_ended: bool
    isolation: tuple[str, ...]


def run_program(program: str, limits: Limits, *, isolation: Isolation = "required") -> Outcome:
    """Run a Python program and everything it starts, and end it all.

    Args:
        program: its text; it may import what this interpreter can.
        limits: what it may use.
        isolation: which namespaces; limits and the rest of the list above hold in any case.

    Raises:
        UsageError: this system does not allow that, and the program was not run.
    """
    if sys.platform != "linux":
        raise UsageError("programs are only run on Linux, which can bound them; leave this task out.")
    with tempfile.TemporaryDirectory(prefix="unmergeable-", ignore_cleanup_errors=True) as folder, _pipe() as (out, to):
        Path(folder).chmod(0o777)  # root's programs run as nobody
        settings = {
            "folder": folder,
            "report": to,
            "isolation": isolation,
            "cpu_seconds": max(1, round(limits.seconds)),
            "memory_bytes": limits.memory_megabytes * _MEGABYTE,
            "file_bytes": limits.file_megabytes * _MEGABYTE,
            "processes": limits.processes,
        }
        process = subprocess.Popen(  # noqa: S603  our own interpreter with our own text
            [sys.executable, "-s", "-c", _CHILD.read_text(encoding="utf-8"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": folder},
            pass_fds=(to,),
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode(), timeout=2 * limits.seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        outcome = _outcome(out)
    missing = [part for part in FULL_ISOLATION if part not in outcome.isolation]
    if isolation == "required" and missing:
        raise UsageError(
            f"this system does not isolate {' and '.join(missing)} of the programs a model writes; score on one that "
            "does, or set isolation=where_allowed if nothing here is worth protecting."
        )
    return outcome


@lru_cache(maxsize=1)
def available_isolation() -> tuple[str, ...]:
    """Which parts of :data:`FULL_ISOLATION` this system allows, and Python still works with; found by trying."""
    outcome = run_program("import decimal, random", Limits(), isolation="where_allowed")
    return outcome.isolation if outcome.has_ended else ()


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """The ends of a pipe to read from, without waiting, and to write to."""
    out, to = os.pipe()
    os.set_blocking(out, False)
    try:
        yield out, to
    finally:
        os.close(out)
        os.close(to)


def _outcome(out: int) -> Outcome:
    try:
        said = os.read(out, 4096).decode(errors="replace").splitlines()
    except BlockingIOError:
        raise UsageError("a program could not be started under its limits; give it more memory or time.") from None
    return Outcome("ended" in said[1:], tuple(json.loads(said[0])))
