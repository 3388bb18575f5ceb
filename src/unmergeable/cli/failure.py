"""From an exception to one line and an exit code.

0 done   1 failed   2 usage   3 bad input   4 not equivalent   5 key   130 interrupted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from unmergeable.cli.command import Interrupted
from unmergeable.errors import NEEDS_POSIX, UnmergeableError

INTERRUPTED = 130
MAX_MESSAGE = 4000

# Newer versions of typer carry their own copy of click, so click's classes are reached through typer.
PARSING_ERROR = typer.BadParameter.__mro__[2]
assert PARSING_ERROR.__name__ == "ClickException"


@dataclass(frozen=True)
class Failure:
    """``kind`` is the name of the error's class, ``message`` one line: what, where, what to do."""

    kind: str
    message: str
    exit_code: int

    def to_json(self) -> dict[str, Any]:
        return {"error": {"kind": self.kind, "message": self.message, "exit_code": self.exit_code}}


def failure_of(error: BaseException) -> Failure:
    """What to tell the user about ``error``."""
    kind = type(error).__name__
    if isinstance(error, UnmergeableError):
        return _failure(kind, str(error), error.exit_code)
    if isinstance(error, PARSING_ERROR):
        return _failure("UsageError", _parsing_message(error), 2)
    if isinstance(error, Interrupted):
        return _failure("Interrupted", str(error), INTERRUPTED)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _failure("Interrupted", "interrupted.", INTERRUPTED)
    if isinstance(error, ModuleNotFoundError) and error.name == "fcntl":
        return _failure(kind, NEEDS_POSIX, 1)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "unmergeable").startswith("unmergeable"):
        remedy = "python -m pip install 'unmergeable[demo,diffusion]'  (brings everything optional)"
        return _failure(kind, f"the Python package {error.name} is not installed; run: {remedy}", 1)
    if isinstance(error, MemoryError):
        return _failure(kind, "out of memory; close other programs, or use --threads 1 where there is one.", 1)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _failure(kind, f"{where}{error.strerror}.", 1)
    return _failure("InternalError", f"internal error: {kind}: {error}; run again with --debug for the traceback.", 1)


def _failure(kind: str, message: str, exit_code: int) -> Failure:
    words = " ".join(message.split())
    return Failure(kind, words if len(words) <= MAX_MESSAGE else words[:MAX_MESSAGE] + " …", exit_code)


def _parsing_message(error: Any) -> str:
    message = error.format_message().strip()
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "unmergeable"
    end = "" if message.endswith((".", "?", "!")) else "."
    return f"{message}{end} See: {command} --help"
