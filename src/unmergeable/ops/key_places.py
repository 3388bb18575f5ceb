"""Where keys are when nobody says where: in one folder of the user's, away from everything that is published.

People upload the folder around a release as easily as the release. ``UNMERGEABLE_KEYS`` names another folder, or is
``beside`` for ``OUT.key`` beside OUT, where nothing outlives the command but the folder it works in (containers).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from unmergeable.errors import KeyFileError
from unmergeable.gauge.key import describe_key

VARIABLE = "UNMERGEABLE_KEYS"
BESIDE = "beside"

_REMEDY = f"give --key FILE, or name a folder of yours in {VARIABLE}"


def key_folder() -> Path | None:
    """The folder of keys, which need not be there yet; None where keys lie beside what they open.

    Raises:
        KeyFileError: the user has no home.
    """
    named = os.environ.get(VARIABLE)
    if named == BESIDE:
        return None
    if named:
        return Path(named)
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data.is_absolute():  # is to be ignored, says the specification of these folders
        try:
            data = Path.home() / ".local" / "share"
        except RuntimeError:  # a user without an entry, as some containers have them
            raise KeyFileError(f"you have no home folder for keys; {_REMEDY}.") from None
    return data / "unmergeable" / "keys"


def default_key(out: Path) -> Path:
    """The key file of a release: called after it and its place, so that the same command finds it again."""
    folder = key_folder()
    if folder is None:
        return _beside(out)
    place = out.parent.resolve() / out.name
    return folder / f"{out.name}-{hashlib.blake2b(os.fsencode(place), digest_size=4).hexdigest()}.key"


def make_key_folder(path: Path) -> None:
    """Make the folder of a default key where it is not there, open to its owner alone.

    Raises:
        KeyFileError: it cannot be made, or others may write to it.
    """
    folder = path.parent
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        is_open = folder.stat().st_mode & 0o022
    except OSError as error:
        raise KeyFileError(f"the folder of keys {folder} cannot be made ({error.strerror}); {_REMEDY}.") from None
    if is_open:
        raise KeyFileError(f"others may write to the folder of keys {folder}; run: chmod 700 {folder}")


def named_key(path: Path) -> Path:
    """The key file that ``path`` means: itself, or where it is not there, and is called OUT.key, the key of OUT.

    Commands and scripts that were written when keys lay beside their releases go on working.
    """
    if path.suffix != ".key" or os.path.lexists(path):
        return path
    moved = default_key(path.with_suffix(""))
    return moved if moved.is_file() else path


def find_key(release: Path, fingerprint: str | None) -> Path:
    """The key of a release by its fingerprint: in the folder of keys, or beside the release.

    Raises:
        KeyFileError: there is none, or the release does not say which it is.
    """
    if fingerprint is None:
        raise KeyFileError(f"{release} does not say which key opens it; give it with --key FILE.")
    for path in _candidates(release):
        try:
            if describe_key(path).fingerprint == fingerprint:
                return path
        except KeyFileError:
            continue  # of other things, or of other people
    folder = key_folder()
    where = f"beside {release}" if folder is None else f"in {folder} nor beside {release}"
    neither = "not" if folder is None else "neither"
    raise KeyFileError(f"key {fingerprint[:8]} is {neither} {where}; give it with --key FILE.")


def _candidates(release: Path) -> Iterator[Path]:
    folder = key_folder()
    if folder is not None and folder.is_dir():
        yield from sorted(folder.glob("*.key"))
    yield _beside(release)


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.key")
