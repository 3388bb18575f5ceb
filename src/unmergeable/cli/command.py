"""What all commands share: the switches they take, the work they do, the outcome they return."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from unmergeable.cli.progress_display import progress_display
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class Outcome:
    """The result of a command: ``document`` for ``--json``, ``text`` for people, and the exit code of both."""

    document: Mapping[str, Any]
    text: Sequence[str]
    exit_code: int = 0


@dataclass(frozen=True)
class Switches:
    """``--json``, ``--quiet`` and ``--debug``, wherever they stand among the arguments."""

    json: bool = False
    quiet: bool = False
    debug: bool = False

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Switches:
        """Look for them without parsing the rest, so that they hold for errors in the rest as well."""
        words = set(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        return cls(json="--json" in words, quiet="--quiet" in words, debug="--debug" in words)


JsonSwitch = Annotated[bool, typer.Option("--json", help="Print one JSON object, for errors too.")]
QuietSwitch = Annotated[bool, typer.Option("--quiet", help="Do not show progress.")]
DebugSwitch = Annotated[bool, typer.Option("--debug", help="Log more, and print the traceback of an error.")]


def with_switches(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """The command ``function``, accepting the switches as well; their values reach it in ``context.obj``."""
    switches = {"json": JsonSwitch, "quiet": QuietSwitch, "debug": DebugSwitch}

    @functools.wraps(function)
    def command(**arguments: Any) -> Outcome:
        return function(**{name: value for name, value in arguments.items() if name not in switches})

    signature = inspect.signature(function, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in switches.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


class Interrupted(Exception):
    """Ctrl-C. The text says what the user can do next."""


@contextmanager
def working(context: typer.Context, *, can_resume: bool = False) -> Iterator[Progress]:
    """Wrap a call of the library: give it a progress callback, and turn Ctrl-C into :class:`Interrupted`.

    Whatever libraries print meanwhile goes to stderr: stdout is for the result.

    Args:
        context: of the command.
        can_resume: whether the same command, run again after Ctrl-C, resumes where this one stopped.
    """
    try:
        with redirect_stdout(sys.stderr):
            if context.obj.quiet:
                yield silent
            else:
                with progress_display(sys.stderr) as progress:
                    yield progress
    except KeyboardInterrupt:
        advice = "; run the same command again to resume" if can_resume else ""
        raise Interrupted(f"interrupted{advice}.") from None
