"""``unmergeable key``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import PassphraseSwitch
from unmergeable.cli.passphrase import read_new_passphrase, read_passphrase
from unmergeable.errors import UsageError


class Action(str, Enum):
    """What to do with a key file."""

    SHOW = "show"
    CHANGE_PASSPHRASE = "change-passphrase"  # noqa: S105  no passphrase itself


def key(
    context: typer.Context,
    action: Annotated[Action, typer.Argument(metavar="ACTION", help="show, or change-passphrase.")],
    file: Annotated[Path, typer.Argument(metavar="KEY", help="A key file that `protect` made.")],
    releases: Annotated[
        list[Path] | None, typer.Argument(metavar="[RELEASE]...", help="For show: folders that it may open.")
    ] = None,
    passphrase: PassphraseSwitch = False,
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="For change-passphrase: leave the secret without one.")
    ] = False,
) -> Outcome:
    """Say what a key file opens, or change its passphrase.

    The secret is never shown. change-passphrase asks for the new passphrase, or reads UNMERGEABLE_NEW_PASSPHRASE.

    Example:
      unmergeable key show ./release.key ./release
    """
    if action is Action.SHOW and unencrypted:
        raise UsageError("key show changes nothing: leave out --unencrypted.")
    if action is Action.CHANGE_PASSPHRASE and releases:
        raise UsageError("key change-passphrase takes one key file: leave out the folders.")
    old = read_passphrase(is_asked_for=passphrase, is_new=False)
    new = None if unencrypted or action is Action.SHOW else read_new_passphrase()
    with working(context):
        from unmergeable import ops

        if action is Action.SHOW:
            result = ops.show_key(file, releases=releases or [], passphrase=old)
        else:
            result = ops.change_passphrase(file, passphrase=old, new=new)
    return Outcome(result.to_json(), result.lines())
