"""Every error the library raises on purpose.

    UnmergeableError               1   anything that failed
    ├── DiskError                  1   a file cannot be written: the disk is full, failed or not ours
    ├── UsageError                 2   the command or a setting is wrong
    ├── BadInput                   3   a checkpoint, base, plan or adapter cannot be used
    │   ├── CheckpointError            files: truncated, unsafe names, pickle, missing shards
    │   ├── UnsupportedArchitecture    no symmetry map, or a tensor no map claims
    │   └── Mismatch                   two checkpoints that do not belong together
    ├── NotEquivalent              4   the written checkpoint computes something else
    └── KeyFileError               5   key missing, wrong, badly kept, or in the way

The number is the exit code of the command line (see ``docs/command-line.md``).
A message is one line: what, where, what to do.
"""

import reprlib
from typing import ClassVar

_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel = 2
_BOUNDED.maxstring = _BOUNDED.maxother = _BOUNDED.maxlong = 100


def shown(value: object) -> str:
    """A value as a message may show it: its ``repr``, with the middle left out where it is long or deep.

    Whatever comes from a file goes through here: a few bytes of YAML can stand for gigabytes of text.
    """
    return _BOUNDED.repr(value)


NEEDS_POSIX = "unmergeable needs Linux or macOS, whose locks on files it uses; on Windows, run it in WSL."


class UnmergeableError(Exception):
    """Base of every error raised on purpose by this package."""

    exit_code: ClassVar[int] = 1


class DiskError(UnmergeableError):
    """A file cannot be written: the disk is full, has failed, or may not be written to."""


class UsageError(UnmergeableError):
    """The request itself is wrong: an unknown method, a setting out of range."""

    exit_code: ClassVar[int] = 2


class BadInput(UnmergeableError):
    """An input exists but cannot be used."""

    exit_code: ClassVar[int] = 3


class CheckpointError(BadInput):
    """Files of a checkpoint are missing, damaged or unsafe."""


class UnsupportedArchitecture(BadInput):
    """No symmetry map covers this model, or a tensor in it is unclaimed."""


class Mismatch(BadInput):
    """Two checkpoints that must belong together do not."""


class NotEquivalent(UnmergeableError):
    """The written checkpoint does not compute what the original computes."""

    exit_code: ClassVar[int] = 4


class KeyFileError(UnmergeableError):
    """A key file is missing, wrong, readable by others, or in the way."""

    exit_code: ClassVar[int] = 5


def first_line(error: BaseException) -> str:
    """What a library says of a failure, on one line; the name of the error's class where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
