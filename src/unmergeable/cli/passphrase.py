"""Read a passphrase from the environment or a hidden prompt; never from an argument, which other users can list."""

from __future__ import annotations

import getpass
import os
import sys

from unmergeable.errors import UsageError

VARIABLE = "UNMERGEABLE_PASSPHRASE"
NEW_VARIABLE = "UNMERGEABLE_NEW_PASSPHRASE"


def read_passphrase(*, is_asked_for: bool, is_new: bool) -> str | None:
    """The passphrase of a key file, or None where none is wanted.

    Args:
        is_asked_for: whether ``--passphrase`` was given. The environment variable counts without it too.
        is_new: whether the file is about to be made: then it is asked for twice.

    Raises:
        UsageError: an empty one, two that differ, or nobody to ask.
    """
    from_environment = _of_environment(VARIABLE)
    if from_environment is not None or not is_asked_for:
        return from_environment
    _require_terminal("--passphrase", VARIABLE)
    passphrase = _ask("Passphrase of the key file: ")
    return _repeated(passphrase) if is_new else passphrase


def read_new_passphrase() -> str:
    """The passphrase that a key file is to have from now on.

    Raises:
        UsageError: an empty one, two that differ, or nobody to ask.
    """
    from_environment = _of_environment(NEW_VARIABLE)
    if from_environment is not None:
        return from_environment
    _require_terminal("change-passphrase", NEW_VARIABLE)
    return _repeated(_ask("New passphrase of the key file: "))


def _of_environment(variable: str) -> str | None:
    value = os.environ.get(variable)
    if value is None:
        return None
    # An empty variable is more likely a secret that a script failed to look up than the wish for none.
    return _require_some(value, f"{variable} is empty; unset it, or set it to the passphrase.")


def _require_terminal(what: str, variable: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"{what} needs a terminal to ask on; in a script set {variable} instead.")


def _repeated(passphrase: str) -> str:
    if _ask("Repeat the passphrase: ") != passphrase:
        raise UsageError("the two passphrases differ; run the command again.")
    return passphrase


def _ask(prompt: str) -> str:
    try:
        answer = getpass.getpass(prompt)
    except EOFError:
        answer = ""
    except UnicodeDecodeError:
        raise UsageError("the passphrase is not UTF-8 text; set the locale of the terminal to UTF-8.") from None
    return _require_some(answer, "no passphrase was given; leave --passphrase out to do without.")


def _require_some(passphrase: str, otherwise: str) -> str:
    if not passphrase:
        raise UsageError(otherwise)
    try:
        passphrase.encode()
    except UnicodeEncodeError:
        raise UsageError("the passphrase is not UTF-8 text; set the locale of the terminal to UTF-8.") from None
    return passphrase
