"""The folder a result grows in, and the journal by which a killed run resumes.

    OUT.partial/lock         held (flock) by the process that writes
    OUT.partial/journal      one JSON object a line: what is known to be on the disk
    OUT.partial/checkpoint/  becomes OUT with one rename, when everything in it is verified
    OUT.partial/shares/      where other processes write shards of it (:mod:`unmergeable.checkpoint.sharing`)

The journal and the lock stay behind when the folder is renamed, so a result never holds them, and they are there
until the instant at which they are no longer needed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import sync_folder, write_error, writing
from unmergeable.checkpoint.listing import MANIFEST_NAME
from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.errors import BadInput, CheckpointError

logger = logging.getLogger(__name__)

JOURNAL_FORMAT = 1
FILES = "checkpoint"
SHARES = "shares"
PARTIAL = ".partial"
_LOCK, _JOURNAL = "lock", "journal"


@dataclass(frozen=True)
class Safe:
    """The first ``position`` bytes of a shard are on the disk; their hash, unless nobody asked for it."""

    position: int
    sha256: str | None


@dataclass
class Done:
    """What a journal knows: shards that are complete, how far others are, hashes of inputs read to the end."""

    finished: dict[str, FileRecord] = field(default_factory=dict)
    begun: dict[str, Safe] = field(default_factory=dict)
    inputs: dict[str, FileRecord] = field(default_factory=dict)


class PartialFolder:
    """``OUT.partial``, locked. Use as a context manager; leaving it releases the lock and keeps the files.

    Args:
        out: the folder to become; its parent must exist.
        token: identifies the work. A partial result with another token is discarded.

    Raises:
        BadInput: when another process is writing there, ``out`` exists, or ``OUT.partial`` holds foreign files.
    """

    def __init__(self, out: Path, token: str) -> None:
        self._out = out
        self._folder = partial_of(out)
        self.files = self._folder / FILES
        self.shares = self._folder / SHARES
        self._lock = -1
        self._journal = -1
        self.done = Done()
        try:
            self._lock = _take_lock(out, self._folder)
            _require_nothing_at(out)
            self._resume_or_begin(token)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; what is in the folder stays."""
        for descriptor in (self._journal, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._journal = self._lock = -1

    def note_safe(self, shard: str, safe: Safe) -> None:
        self._append({"shard": shard, "position": safe.position, "sha256": safe.sha256})

    def note_finished(self, record: FileRecord) -> None:
        self._append({"finished": record.name, "size": record.size, "sha256": record.sha256})

    def note_input(self, path: str, record: FileRecord) -> None:
        """Record the hash of an input file, so that a resumed run need not read it again."""
        self._append({"input": path, "name": record.name, "size": record.size, "xxh3_128": record.xxh3_128})

    def remove_all_but(self, names: Collection[str]) -> None:
        """Delete the files of an earlier run that are written anew anyway, or are no longer part of the result."""
        for path in self.files.iterdir():
            if path.name not in names:
                _remove_tree(path)

    def remove_share(self, name: str) -> None:
        """Delete what attempts at a share of the work left behind, in folders whose names begin with its own."""
        for path in self.shares.glob(f"{name}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def commit(self) -> None:
        """Make the result visible under its final name, at once and for good."""
        sync_folder(self.files)
        _require_nothing_at(self._out)
        with writing(self._out):
            self.files.rename(self._out)
        sync_folder(self._out.parent)
        _remove_partial(self._folder)

    def discard(self) -> None:
        _remove_partial(self._folder)

    def _resume_or_begin(self, token: str) -> None:
        path = self._folder / _JOURNAL
        lines, understood = _read_lines(path)
        begins = _first_line(token)
        resumes = bool(lines) and lines[0] == begins
        if resumes:
            for line in lines[1:]:
                _replay(line, self.done)
            logger.info("resuming %s: %d shards are complete", self._folder, len(self.done.finished))
        else:
            if lines or self.files.exists():
                logger.info("discarding %s: it was begun for other work", self._folder)
            path.unlink(missing_ok=True)
            _remove_tree(self.files)
        _remove_shares(self._folder)
        self.files.mkdir(exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._journal = os.open(path, flags, 0o644)
        if resumes:
            os.ftruncate(self._journal, understood)  # a line torn by a crash would swallow the next one
        else:
            self._append(begins)
        sync_folder(self._folder)

    def _append(self, line: Mapping[str, Any]) -> None:
        with writing(self._folder / _JOURNAL):
            os.write(self._journal, json.dumps(line).encode() + b"\n")
            os.fsync(self._journal)


def partial_of(out: Path) -> Path:
    """The folder in which ``out`` grows."""
    return out.with_name(out.name + PARTIAL)


def require_creatable(out: Path, *beside: str) -> None:
    """Refuse an output folder that could not be created, before any work for it begins.

    Args:
        out: the folder to become.
        beside: ends of the names of other folders that come beside it.

    Raises:
        BadInput: its parent does not exist, its name is impossible, or something is there (:func:`require_absent`).
    """
    if out.name in ("", "..") or "\0" in str(out):
        raise BadInput(f"{str(out)!r} cannot be created: it is no name of a folder; choose another.")
    if not out.parent.is_dir():
        raise BadInput(f"{out} cannot be created: its parent folder {out.parent} does not exist; create it first.")
    longest = os.pathconf(out.parent, "PC_NAME_MAX")
    end = max((PARTIAL, *beside), key=len)
    if len(os.fsencode(out.name + end)) > longest:
        raise BadInput(f"the name of {out} is too long: names here have at most {longest} bytes, {end} included.")
    require_absent_or_written(out)


def require_absent(out: Path) -> None:
    """Refuse to write over anything, but for what a run left that was killed as the last thing it did.

    Raises:
        BadInput: when ``out`` exists, be it a dangling link.
    """
    if not _ends_an_interrupted_run(out):
        _require_nothing_at(out)


def require_absent_or_written(out: Path) -> None:
    """As :func:`require_absent`, where the writer will tell whether what is there is its own finished result.

    Raises:
        BadInput: when ``out`` exists and was not written by this package.
    """
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        require_absent(out)


def require_outside(out: Path, *folders: Path) -> None:
    """Refuse an output folder that lies in one of these folders, or holds one.

    Raises:
        BadInput: naming the two.
    """
    place = out.parent.resolve() / out.name
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if place == folder or folder in place.parents or place in folder.parents:
            raise BadInput(f"{out} and the input {folder} lie inside each other: choose another output folder.")


def completed_earlier(out: Path, token: str, is_result: Callable[[], bool] = lambda: False) -> bool:
    """Whether ``out`` is the result of this very work already; then what its run may have left is removed.

    Args:
        out: the folder to become.
        token: identifies the work, as in :class:`PartialFolder`.
        is_result: asked where no journal lies beside ``out`` to tell.

    Raises:
        BadInput: when ``out`` is the result of other work, or another process is at it.
    """
    if not os.path.lexists(out):
        return False
    folder = partial_of(out)
    if not _ends_an_interrupted_run(out):
        with suppress(OSError):
            folder.rmdir()  # empty: its run was killed before the last call of all
        if not out.is_symlink() and out.is_dir() and not os.path.lexists(folder) and is_result():
            return True
        _require_nothing_at(out)
    descriptor = _take_lock(out, folder)
    try:
        lines, _ = _read_lines(folder / _JOURNAL)
        if not lines or lines[0] != _first_line(token):
            _require_nothing_at(out)
        _remove_partial(folder)
    finally:
        os.close(descriptor)
    return True


def _ends_an_interrupted_run(out: Path) -> bool:
    folder = partial_of(out)
    return out.is_dir() and (folder / _JOURNAL).is_file() and not os.path.lexists(folder / FILES)


def _require_nothing_at(out: Path) -> None:
    if os.path.lexists(out):
        raise BadInput(f"{out} exists: choose another output folder, or remove it first.")


def _first_line(token: str) -> dict[str, Any]:
    return {"format": JOURNAL_FORMAT, "token": token}


def _take_lock(out: Path, folder: Path) -> int:
    path = folder / _LOCK
    with writing(path):
        folder.mkdir(exist_ok=True)
        _require_ours(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that held the lock may have finished and removed the file in between.
        taken = os.fstat(descriptor).st_nlink > 0
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise write_error(path, error) from error
        raise BadInput(f"{folder} is being written by another process: wait for it to end.") from error
    if not taken:
        os.close(descriptor)
        raise BadInput(f"{folder} was just finished by another process: look for {out}.")
    return descriptor


def _require_ours(folder: Path) -> None:
    """Nothing is deleted in, or written through, what somebody else put there."""
    ours = {_LOCK, _JOURNAL, FILES, SHARES}
    inside = list(folder.iterdir())
    if any(path.is_symlink() for path in (folder, *inside)) or any(path.name not in ours for path in inside):
        raise BadInput(f"{folder} holds files of somebody else: move it away or choose another output folder.")


def _remove_partial(folder: Path) -> None:
    """The journal goes last: as long as it is there, the next run knows whose result this is."""
    _remove_tree(folder / FILES)
    _remove_shares(folder)
    (folder / _LOCK).unlink(missing_ok=True)
    (folder / _JOURNAL).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else may have begun there
        folder.rmdir()


def _remove_shares(folder: Path) -> None:
    """A process that was given up may still write there; what it leaves behind is of no use to anybody."""
    shares = folder / SHARES
    if shares.is_dir() and not shares.is_symlink():
        shutil.rmtree(shares, ignore_errors=True)


def _remove_tree(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's lines up to one that a crash left incomplete, and the bytes they take."""
    lines: list[dict[str, Any]] = []
    understood = 0
    if not path.is_file() or path.is_symlink():
        return lines, understood
    for raw in path.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append(line)
        understood += len(raw)
    return lines, understood


def _replay(line: Mapping[str, Any], done: Done) -> None:
    try:
        if "finished" in line:
            record = FileRecord(line["finished"], line["size"], line["sha256"])
            done.finished[record.name] = record
        elif "input" in line:
            done.inputs[line["input"]] = FileRecord(line["name"], line["size"], xxh3_128=line["xxh3_128"])
        else:
            done.begun[line["shard"]] = Safe(line["position"], line["sha256"])
    except KeyError as error:
        raise CheckpointError(f"the journal of a partial result lacks {error}: remove the .partial folder.") from error
