"""Keys: what a key file is, what it opens, and another passphrase for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.errors import KeyFileError, shown
from unmergeable.gauge import key as key_files
from unmergeable.gauge.signature import public_key_of
from unmergeable.ops.key_places import named_key
from unmergeable.ops.opened import AnyPath
from unmergeable.ops.recorded import methods_of


@dataclass(frozen=True)
class KeyResult:
    """What a key file is. Nothing in it is secret.

    Attributes:
        path: the file.
        fingerprint: 32 hex digits, which stand in the manifest of what it opens too.
        recipe: the methods with their settings, the architecture, and a digest of the checkpoint that was protected.
        is_encrypted: whether reading it takes a passphrase.
        public_key: 64 hex digits that check the signatures of its releases; None where the passphrase was not given.
        opens: by the folder that was asked about, whether the key opens it.
    """

    path: Path
    fingerprint: str
    recipe: Mapping[str, Any]
    is_encrypted: bool
    public_key: str | None
    opens: Mapping[str, bool]

    def to_json(self) -> dict[str, Any]:
        return {
            "key": str(self.path),
            "key_fingerprint": self.fingerprint,
            "recipe": dict(self.recipe),
            "encrypted": self.is_encrypted,
            "public_key": self.public_key,
            "opens": dict(self.opens),
        }

    def lines(self) -> list[str]:
        """The same for a terminal."""
        methods = ", ".join(methods_of({"recipe": self.recipe})) or "nothing known"
        architecture = shown(self.recipe.get("architecture"))[1:-1]
        lines = [
            f"Key: {self.path} (fingerprint {self.fingerprint}; {'' if self.is_encrypted else 'not '}encrypted)",
            f"Made by: {methods} ({architecture})",
        ]
        if self.public_key is None:
            lines += ["Public key of its signatures: give the passphrase to see it"]
        else:
            lines += [f"Public key of its signatures: {self.public_key}"]
        return [*lines, *(f"{'Opens' if opens else 'Does not open'}: {name}" for name, opens in self.opens.items())]


def show_key(path: AnyPath, *, releases: Sequence[AnyPath] = (), passphrase: str | None = None) -> KeyResult:
    """Describe a key file without showing its secret.

    Args:
        path: the key file.
        releases: folders that ``protect`` wrote, or ``hub:OWNER/NAME``: does the key open them?
        passphrase: of the key file. Without it what an encrypted file says of itself is not checked.

    Raises:
        KeyFileError: it is no key file, it is not well kept, or the passphrase is wrong.
        CheckpointError: one of the folders cannot be read.
    """
    path = named_key(Path(path))
    described = key_files.describe_key(path)
    public_key = None
    if passphrase is not None or not described.is_encrypted:
        public_key = public_key_of(key_files.read_key(path, passphrase))
    opens = {str(release): _opens(described.fingerprint, folder_of(release)) for release in releases}
    return KeyResult(path, described.fingerprint, described.recipe, described.is_encrypted, public_key, opens)


def change_passphrase(path: AnyPath, *, passphrase: str | None = None, new: str | None = None) -> KeyResult:
    """Encrypt a key file under another passphrase, or under none. The key stays the same, and what it opens.

    A file that is as it is asked to be stays as it is: so the same call ends well after one that a disk broke off.
    Copies of the old file still open with the old passphrase, and so may the blocks it lay in on the disk.

    Args:
        path: the key file.
        passphrase: the present one; None where there is none.
        new: the new one; None leaves the secret unencrypted.

    Raises:
        KeyFileError: it cannot be read, or the passphrase is wrong.
        DiskError: it cannot be written; the old file stays as it was.
    """
    path = named_key(Path(path))
    key = _already(path, new) or key_files.change_passphrase(path, passphrase, new)
    # Not read again: the work is done, and must not be said to have failed.
    return KeyResult(path, key.fingerprint, key.recipe, new is not None, public_key_of(key), {})


def _already(path: Path, new: str | None) -> key_files.Key | None:
    """The key, where its file has this passphrase already, or none where none is wanted."""
    if key_files.describe_key(path).is_encrypted != (new is not None):
        return None
    try:
        return key_files.read_key(path, new)
    except KeyFileError:
        return None  # another passphrase


def _opens(fingerprint: str, folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.details.get("key_fingerprint") == fingerprint
