"""``unmergeable restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import KeyOption, OutOption, PassphraseSwitch, ThreadsOption
from unmergeable.cli.passphrase import read_passphrase


def restore(
    context: typer.Context,
    protected: Annotated[Path, typer.Argument(metavar="PROTECTED", help="Folder that `protect` wrote.")],
    out: OutOption,
    key: KeyOption = None,
    passphrase: PassphraseSwitch = False,
    threads: ThreadsOption = None,
) -> Outcome:
    """Give the original weights back from a protected copy and its key.

    They differ from the original's by rounding, and compute the same.

    Example:
      unmergeable restore ./release --out ./restored
    """
    secret = read_passphrase(is_asked_for=passphrase, is_new=False)
    with working(context, can_resume=True) as progress:
        from unmergeable import ops

        result = ops.restore(protected, key=key, out=out, passphrase=secret, threads=threads, progress=progress)
    return Outcome(result.to_json(), result.lines())
