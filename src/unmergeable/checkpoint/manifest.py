"""``unmergeable.json``: what a written checkpoint was made of, and the size and hash of every file of it.

Holds no secrets and no paths: files are named without their folders, and the command line is not recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import read_file, reading
from unmergeable.checkpoint.header import MAX_HEADER_BYTES, strict_json
from unmergeable.checkpoint.listing import (
    CARD_NAME,
    MANIFEST_NAME,
    LeftOut,
    ListedFile,
    Listing,
    is_for_people,
    list_folder,
)
from unmergeable.errors import CheckpointError, UsageError, shown

FORMAT_VERSION = 1
TOOL = "unmergeable"

_OWN_KEYS = ("format_version", "tool", "tool_version", "inputs", "outputs", "left_out", "signature")
_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """One file: its name in the checkpoint's folder, its size in bytes, and one hash in hex.

    ``sha256`` is that of the whole file. Of weights that were read ``xxh3_128`` is in its place, XXH3 of 128 bits,
    which tells files apart that nobody made to be confused. Where a caller did without reading the weights of a
    safetensors file it is ``header_sha256``, of the file's length prefix and header: the name, dtype, shape and place
    of every tensor, and nothing of its values.
    """

    name: str
    size: int
    sha256: str | None = None
    header_sha256: str | None = None
    xxh3_128: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The record kept beside a written checkpoint.

    ``inputs`` maps a role (``"source"``, ``"base"`` …) to the files read for it. ``details`` is the part of the
    caller (recipe, architecture, measured errors …), JSON-able; its keys stand beside these fields in the file.
    ``signature`` is one of :meth:`signed_bytes`; None where nobody signed.
    """

    outputs: tuple[FileRecord, ...]
    inputs: Mapping[str, tuple[FileRecord, ...]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    tool_version: str = field(default_factory=lambda: installed_version())
    format_version: int = FORMAT_VERSION
    signature: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """The text of ``unmergeable.json``."""
        signature = {} if self.signature is None else {"signature": dict(self.signature)}
        return json.dumps({**self._record(), **signature}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def signed_bytes(self) -> bytes:
        """What a signature is of: all but the signature, in one form whatever the order of names in the file."""
        return json.dumps(self._record(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def _record(self) -> dict[str, Any]:
        require_details(self.details)
        return {
            "format_version": self.format_version,
            "tool": TOOL,
            "tool_version": self.tool_version,
            **self.details,
            "inputs": {role: [_file_json(file) for file in files] for role, files in self.inputs.items()},
            "outputs": [_file_json(file) for file in self.outputs],
            "left_out": [{"name": item.name, "reason": item.reason} for item in self.left_out],
        }

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: for text that is no manifest, or one of a later format.
        """
        record = strict_json(text, where)
        if not isinstance(record, dict) or record.get("tool") != TOOL:
            raise CheckpointError(f"{where}: not a manifest of {TOOL}.")
        if record.get("format_version") != FORMAT_VERSION:
            theirs = shown(record.get("format_version"))
            raise CheckpointError(f"{where}: format {theirs}, this version reads {FORMAT_VERSION}; update {TOOL}.")
        try:
            return cls(
                outputs=tuple(_file_record(item) for item in record["outputs"]),
                inputs={role: tuple(_file_record(item) for item in files) for role, files in record["inputs"].items()},
                left_out=tuple(LeftOut(item["name"], item["reason"]) for item in record["left_out"]),
                details={key: value for key, value in record.items() if key not in _OWN_KEYS},
                tool_version=record["tool_version"],
                signature=_signature(record.get("signature")),
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{where}: not a complete manifest ({shown(error)}).") from error


def require_details(details: Mapping[str, Any]) -> None:
    """Require the caller's part to be JSON-able and to leave the manifest's own keys alone.

    Raises:
        UsageError: naming the offending key.
    """
    for key, value in details.items():
        if key in _OWN_KEYS:
            raise UsageError(f"manifest key {key!r} is written by the library; choose another.")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"manifest key {key!r} cannot be written as JSON ({error}).") from error


def installed_version(package: str = TOOL) -> str:
    """The version of an installed package, or ``"unknown"`` when it is elsewhere or runs from a bare source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def read_manifest(folder: str | os.PathLike[str] | Listing) -> Manifest | None:
    """The manifest of a checkpoint folder, or None if it has none.

    Raises:
        CheckpointError: when it cannot be read, or is no manifest.
    """
    listing = list_folder(folder)
    if MANIFEST_NAME not in listing.files:
        return None
    return Manifest.from_json(read_file(listing.file(MANIFEST_NAME).path), str(listing.folder / MANIFEST_NAME))


@dataclass(frozen=True)
class Alteration:
    """A file that is not what the manifest says; ``problem`` is one of missing, resized, altered, added."""

    name: str
    problem: str


def check_files(folder: str | os.PathLike[str]) -> tuple[Alteration, ...]:
    """Hash every file of a written checkpoint again and report those that differ from its manifest.

    Altered weights go unnoticed in files that were recorded without hashing them. The card is its owner's to edit, on
    the hub too, and licences and pictures may come to it: no program loads them.

    Raises:
        CheckpointError: when the folder has no manifest.
    """
    listing = list_folder(folder)
    manifest = read_manifest(listing)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: nothing to compare its files with.")
    alterations: list[Alteration] = []
    for record in manifest.outputs:
        if record.name == CARD_NAME:
            continue
        file = _file_of(listing, record.name)
        if file is None or file.problem is not None:
            alterations.append(Alteration(record.name, "missing"))
        elif file.state[0] != record.size:
            alterations.append(Alteration(record.name, "resized"))
        elif record != (record_header if record.sha256 is None else record_file)(file.path, record.name):
            alterations.append(Alteration(record.name, "altered"))
    known = {record.name for record in manifest.outputs} | {MANIFEST_NAME}
    folders = {name.partition("/")[0] for name in known if "/" in name}
    there = [*(name for name in listing.files if name not in folders)]
    there += [f"{name}/{inner}" for name in sorted(folders & listing.files.keys()) for inner in _inner(listing, name)]
    alterations += [Alteration(name, "added") for name in there if name not in known and not is_for_people(name)]
    return tuple(alterations)


def _file_of(listing: Listing, name: str) -> ListedFile | None:
    """A file by its path in the folder; those of modules around a network lie one folder deeper."""
    folder, separator, leaf = name.rpartition("/")
    if not separator:
        return listing.files.get(name)
    outer = listing.files.get(folder)
    return list_folder(listing.folder / folder).files.get(leaf) if outer is not None and outer.is_folder else None


def _inner(listing: Listing, name: str) -> Iterable[str]:
    return list_folder(listing.folder / name).files if listing.files[name].is_folder else ()


def record_file(path: Path, name: str | None = None) -> FileRecord:
    """Hash a file, following links; ``name`` replaces the file's own, which in the hub's cache is a hash."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with reading(path.resolve()) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(name or path.name, size, digest.hexdigest())


def record_header(path: Path, name: str | None = None) -> FileRecord:
    """Hash the header of a safetensors file, and leave its weights unread."""
    with reading(path) as file:
        prefix = file.read(8)
        header = file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size
    return FileRecord(name or path.name, size, None, hashlib.sha256(prefix + header).hexdigest())


def _file_json(file: FileRecord) -> dict[str, Any]:
    hashed = {"sha256": file.sha256, "header_sha256": file.header_sha256, "xxh3_128": file.xxh3_128}
    return {"name": file.name, "size": file.size, **{key: value for key, value in hashed.items() if value is not None}}


def _file_record(item: Mapping[str, Any]) -> FileRecord:
    name, size = str(item["name"]), int(item["size"])
    for kind in ("header_sha256", "xxh3_128"):
        if kind in item:
            return FileRecord(name, size, **{kind: str(item[kind])})
    return FileRecord(name, size, str(item["sha256"]))


def _signature(value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise TypeError("signature")
    return value


def by_name(records: Sequence[FileRecord]) -> tuple[FileRecord, ...]:
    """Records in order of name, so that a manifest does not depend on the order of the work."""
    return tuple(sorted(records, key=lambda record: record.name))
