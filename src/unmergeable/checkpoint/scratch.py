"""A folder beside OUT for work in progress, with a file in it that says whose work it is.

The file comes first and goes last, so that what a killed run left is known for what it is. An empty folder is what a
run leaves that was killed before or after that, and nobody's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unmergeable.checkpoint.disk import remove_leftovers, replace_file, writing
from unmergeable.errors import BadInput, DiskError

MARKER = "request.json"


def is_begun(place: Path, identity: str) -> bool:
    """Whether an earlier run began this very work in ``place``; False where nothing is there.

    Raises:
        BadInput: it holds something else.
    """
    if place.is_dir() and not place.is_symlink():
        remove_leftovers(place / MARKER)
    if not place.is_symlink() and (not place.exists() or (place.is_dir() and not any(place.iterdir()))):
        return False
    marker = place / MARKER
    if place.is_symlink() or not marker.is_file() or marker.read_bytes() != identity.encode():
        raise BadInput(f"{place} holds the unfinished work of another request: remove it, or choose another OUT.")
    return True


@contextmanager
def begun(place: Path, identity: str) -> Iterator[None]:
    """Create ``place``, or take over what an earlier run began there (:func:`is_begun`). Inside, no other process does.

    Raises:
        BadInput: another process is at it, or it holds something else.
        DiskError: it cannot be created.
    """
    with writing(place):
        place.mkdir(exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            with writing(place):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except DiskError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise BadInput(f"{place} is being written by another process: wait for it to end.") from None
        is_begun(place, identity)
        replace_file(place / MARKER, identity.encode())
        yield
    finally:
        os.close(descriptor)


def empty(place: Path) -> None:
    """Remove what lies in it but for the file that says whose it is.

    Raises:
        DiskError: something in it cannot be removed.
    """
    with writing(place):
        for path in place.iterdir():
            if path.name != MARKER:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove(place: Path) -> None:
    """Remove it with all the work in it.

    Raises:
        DiskError: something in it cannot be removed.
    """
    empty(place)
    with writing(place):
        (place / MARKER).unlink()
        place.rmdir()
