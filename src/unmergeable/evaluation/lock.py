"""One audit or table at a time in a folder: two would make the same models at the same time, in the same place."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unmergeable.checkpoint.disk import write_error
from unmergeable.errors import BadInput

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is inside with this folder. The lock goes with the process, however that ends.

    Raises:
        BadInput: another process is there.
        CheckpointError: the lock file cannot be written.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{folder} is the folder of a table or an audit that is running: wait for it to end, or name another."
            ) from None
        except OSError as error:
            raise write_error(path, error) from error
        yield
    finally:
        os.close(descriptor)
