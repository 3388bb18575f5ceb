"""The ``unmergeable`` command: its sub-commands, and what happens around every one of them."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from inspect import getdoc
from typing import Annotated, Any

import typer

from unmergeable.cli.audit import audit, report
from unmergeable.cli.card import card
from unmergeable.cli.command import DebugSwitch, JsonSwitch, Outcome, QuietSwitch, Switches, with_switches
from unmergeable.cli.demo import demo
from unmergeable.cli.failure import INTERRUPTED, failure_of
from unmergeable.cli.inspect import inspect
from unmergeable.cli.key import key
from unmergeable.cli.map import map_
from unmergeable.cli.merge import merge
from unmergeable.cli.methods import methods
from unmergeable.cli.protect import protect
from unmergeable.cli.push import push
from unmergeable.cli.recover import recover
from unmergeable.cli.restore import restore
from unmergeable.cli.rotate import rotate
from unmergeable.cli.schema import schema
from unmergeable.cli.table import table
from unmergeable.cli.verify import verify

COMMANDS: dict[str, Callable[..., Outcome]] = {
    "protect": protect,
    "restore": restore,
    "rotate": rotate,
    "key": key,
    "card": card,
    "push": push,
    "verify": verify,
    "merge": merge,
    "recover": recover,
    "inspect": inspect,
    "map": map_,
    "audit": audit,
    "report": report,
    "table": table,
    "methods": methods,
    "schema": schema,
    "demo": demo,
}
"""Every command by its name, in the order of the help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``arguments`` are those of the process when None."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    switches = Switches.read(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be printable
    with _log_on_stderr(switches):
        try:
            returned = _command()(words or ["--help"], "unmergeable", standalone_mode=False, obj=switches)
            if returned == INTERRUPTED:  # some versions of typer turn Ctrl-C into an exit code by themselves
                raise KeyboardInterrupt  # noqa: TRY301
        except (Exception, KeyboardInterrupt) as error:
            return _report_failure(error, switches)
    if not isinstance(returned, Outcome):  # --help and --version have printed already
        return int(returned or 0)
    lines = [_to_json(returned.document)] if switches.json else returned.text
    _print("\n".join(lines))
    return returned.exit_code


def _command() -> Any:
    app = typer.Typer(
        add_completion=False,
        # A traceback must never show locals: they may hold a key.
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        rich_markup_mode=None,
    )
    app.callback()(_unmergeable)
    for name, function in COMMANDS.items():
        text, _, example = (getdoc(function) or "").partition("\n\nExample:\n")
        # \b keeps the lines of the example as they are.
        app.command(name, help=text, epilog=f"\b\nExample:\n{example}")(with_switches(function))
    return typer.main.get_command(app)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        try:
            print(version("unmergeable"))
        except PackageNotFoundError:
            print("unknown (not installed)")
        raise typer.Exit


def _unmergeable(
    json: JsonSwitch = False,
    quiet: QuietSwitch = False,
    debug: DebugSwitch = False,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Publish an open-weight model without letting others merge it into theirs, and see what the protection is worth.

    Start with `unmergeable demo`. Each command has its own --help.
    """


def _report_failure(error: BaseException, switches: Switches) -> int:
    failure = failure_of(error)
    if switches.debug:
        traceback.print_exception(error)
    if switches.json:
        _print(_to_json(failure.to_json()))
    else:
        print(f"error: {failure.message}", file=sys.stderr)
    return failure.exit_code


def _print(text: str) -> None:
    with suppress(BrokenPipeError):  # whoever reads may have had enough (`| head`); the work is done all the same
        print(text, flush=True)


def _to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """``value`` with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at the moment: a progress bar stands in for it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _log_on_stderr(switches: Switches) -> Iterator[None]:
    logger = logging.getLogger("unmergeable")
    handler, level = _StderrHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if switches.debug else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
