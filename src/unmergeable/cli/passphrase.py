"""Read a passphrase from the environment or a hidden prompt; never from an argument, which other users can list."""

from __future__ import annotations

import getpass
import os
import sys

from unmergeable.errors import UsageError

VARIABLE = "UNMERGEABLE_PASSPHRASE"


def read_passphrase(*, is_asked_for: bool, is_new: bool) -> str | None:
    """The passphrase of a key file, or None where none is wanted.

    Args:
        is_asked_for: whether ``--passphrase`` was given. The environment variable counts without it too.
        is_new: whether the file is about to be made: then it is asked for twice.

    Raises:
        UsageError: an empty one, two that differ, or nobody to ask.
    """
    from_environment = os.environ.get(VARIABLE)
    if from_environment is not None:
        # An empty variable is more likely a secret that a script failed to look up than the wish for none.
        return _require_some(from_environment, f"{VARIABLE} is empty; unset it, or set it to the passphrase.")
    if not is_asked_for:
        return None
    if not sys.stdin.isatty():
        raise UsageError(f"--passphrase needs a terminal to ask on; in a script set {VARIABLE} instead.")
    passphrase = _ask("Passphrase of the key file: ")
    if is_new and _ask("Repeat the passphrase: ") != passphrase:
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
