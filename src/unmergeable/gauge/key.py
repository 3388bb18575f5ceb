"""The owner's key file: 32 secret bytes and the recipe they were used with.

The secret never leaves this file: checkpoints carry only its fingerprint. With a passphrase the secret is encrypted
(scrypt, AES-256-GCM, the recipe authenticated with it).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmergeable.errors import KeyFileError
from unmergeable.randomness import KEY_BYTES, Stream

FORMAT = "unmergeable-key/1"
SCRYPT = {"n": 1 << 15, "r": 8, "p": 1}


@dataclass(frozen=True)
class Key:
    """A secret and what it was used for. ``recipe`` is JSON-able and holds nothing secret."""

    entropy: bytes = field(repr=False)
    recipe: Mapping[str, Any]

    def stream(self) -> Stream:
        """The secret random stream that every gauge of the recipe is drawn from."""
        return Stream.from_entropy(self.entropy)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that identify this key and recipe, and say nothing about the secret."""
        digest = hashlib.blake2b(_canonical(self.recipe), key=self.entropy, digest_size=16, person=b"unmergeable-id")
        return digest.hexdigest()


def write_key(path: Path, key: Key, passphrase: str | None = None) -> None:
    """Create the key file, readable by its owner only; it is on disk when this returns.

    Raises:
        KeyFileError: something is already at ``path``, or its folder cannot be written.
    """
    document: dict[str, Any] = {"format": FORMAT, "fingerprint": key.fingerprint, "recipe": dict(key.recipe)}
    if passphrase is None:
        document["secret"] = base64.b64encode(key.entropy).decode()
    else:
        document["encrypted_secret"] = _encrypt(key, passphrase)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise KeyFileError(f"key file {path} exists and is never overwritten; name another, or move it away.") from None
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be created: {error.strerror}; choose another place.") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_key(path: Path, passphrase: str | None = None) -> Key:
    """Read a key file back.

    Raises:
        KeyFileError: missing, readable by others, damaged, or the passphrase is wrong or not given.
    """
    document = _read_document(path)
    recipe = document.get("recipe")
    if document.get("format") != FORMAT or not isinstance(recipe, dict):
        raise KeyFileError(
            f"{path} is not a key file of this tool (format {FORMAT}); give the file that `protect` made."
        )
    try:
        if "encrypted_secret" in document:
            entropy = _decrypt(document, passphrase, path)
        else:
            entropy = base64.b64decode(str(document.get("secret")), validate=True)
    except (ValueError, KeyError, TypeError):
        raise KeyFileError(f"key file {path} is damaged; restore it from your backup.") from None
    key = Key(entropy, recipe)
    if len(entropy) != KEY_BYTES or key.fingerprint != document.get("fingerprint"):
        raise KeyFileError(f"key file {path} was altered or is damaged; restore it from your backup.")
    return key


def is_encrypted(path: Path) -> bool:
    """Whether reading this key file needs a passphrase."""
    return "encrypted_secret" in _read_document(path)


def _read_document(path: Path) -> dict[str, Any]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise KeyFileError(f"key file {path} does not exist; check the path.") from None
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be read: {error.strerror}.") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"key file {path} is not a regular file; check the path.")
        if status.st_mode & 0o077:
            raise KeyFileError(f"key file {path} can be read by other users; run: chmod 600 {path}")
        try:
            document = json.loads(file.read(1 << 20))
        except ValueError:
            document = None
    if not isinstance(document, dict):
        raise KeyFileError(
            f"{path} is not a key file of this tool (format {FORMAT}); give the file that `protect` made."
        )
    return document


def _canonical(recipe: Mapping[str, Any]) -> bytes:
    return json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()


def _derive(passphrase: str, salt: bytes, cost: Mapping[str, int]) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=salt, length=32, n=cost["n"], r=cost["r"], p=cost["p"]).derive(passphrase.encode())


def _encrypt(key: Key, passphrase: str) -> dict[str, Any]:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = os.urandom(16), os.urandom(12)
    secret = AESGCM(_derive(passphrase, salt, SCRYPT)).encrypt(nonce, key.entropy, _canonical(key.recipe))
    encoded = {
        name: base64.b64encode(value).decode()
        for name, value in (("salt", salt), ("nonce", nonce), ("ciphertext", secret))
    }
    return {"kdf": "scrypt", **SCRYPT, "cipher": "AES-256-GCM", **encoded}


def _decrypt(document: Mapping[str, Any], passphrase: str | None, path: Path) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if passphrase is None:
        raise KeyFileError(
            f"key file {path} is encrypted; give its passphrase (--passphrase, or UNMERGEABLE_PASSPHRASE)."
        )
    box = document["encrypted_secret"]
    cost = {name: int(box[name]) for name in SCRYPT}
    if cost["n"] > 1 << 20 or cost["r"] > 32 or cost["p"] > 16:
        raise ValueError("scrypt cost beyond what this tool writes")
    salt, nonce, secret = (base64.b64decode(box[name], validate=True) for name in ("salt", "nonce", "ciphertext"))
    try:
        return AESGCM(_derive(passphrase, salt, cost)).decrypt(nonce, secret, _canonical(document["recipe"]))
    except InvalidTag:
        raise KeyFileError(f"wrong passphrase for key file {path}.") from None
