"""The command line: a thin skin over :mod:`unmergeable.ops`, one file per command.

A command turns its arguments into one call of the library and the result into an :class:`~.command.Outcome`. What
surrounds it (``--json``, exit codes, errors on one line, the progress bar) is in :mod:`.app` and is the same for all.
"""

from unmergeable.cli.app import main

__all__ = ["main"]
