"""``unmergeable rotate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import KeyOption, OutOption, PassphraseSwitch, ThreadsOption
from unmergeable.cli.passphrase import read_passphrase


def rotate(
    context: typer.Context,
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="Folder that `protect` wrote.")],
    out: OutOption,
    key: KeyOption = None,
    new_key: Annotated[
        Path | None,
        typer.Option("--new-key", metavar="FILE", help="Key file to create.  [default: in your folder of keys]"),
    ] = None,
    passphrase: PassphraseSwitch = False,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Draws the new key, for anybody to draw again: for experiments only."),
    ] = None,
    threads: ThreadsOption = None,
) -> Outcome:
    """Protect a release again under a new key, without the original.

    By the same methods and settings. The passphrase of the old key encrypts the new one too. Who has the old release
    still has it, and the old key still opens it.

    Example:
      unmergeable rotate ./release --out ./release-2
    """
    secret = read_passphrase(is_asked_for=passphrase, is_new=False)
    with working(context, can_resume=True) as progress:
        from unmergeable import ops

        result = ops.rotate(
            release, key=key, out=out, new_key=new_key, passphrase=secret, seed=seed, threads=threads, progress=progress
        )
    return Outcome(result.to_json(), result.lines())
