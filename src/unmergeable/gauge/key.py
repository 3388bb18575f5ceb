"""The owner's key file: 32 secret bytes and the recipe they were used with.

The secret never leaves this file: checkpoints carry only its fingerprint. With a passphrase the secret is encrypted
(scrypt, AES-256-GCM, the recipe authenticated with it).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unmergeable.checkpoint.disk import create_whole, is_disk_failure, remove_leftovers, replace_file, write_error
from unmergeable.errors import KeyFileError
from unmergeable.randomness import KEY_BYTES, Stream

FORMAT = "unmergeable-key/1"
KDF, CIPHER = "scrypt", "AES-256-GCM"
SCRYPT = {"n": 1 << 15, "r": 8, "p": 1}
MAX_SCRYPT_WORK = 1 << 28
"""Bytes of memory times passes: eight times what SCRYPT asks for, so that a damaged file cannot ask for hours."""
MAX_BYTES = 1 << 28
"""Key files are small but for the orders some methods keep there: 4 bytes for each hidden unit of each layer."""

_IN_A_KEY = re.compile(rb'"format"\s*:\s*"unmergeable-key/\d')


@dataclass(frozen=True)
class Draws:
    """What gauges are drawn from: all of a key that a process needs to write a part of what the key protects.

    It gives the original back as the key does. It signs nothing: the secret that signs cannot be computed from it.
    """

    stream: Stream
    orders: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Key:
    """A secret and what it was used for. ``recipe`` is JSON-able and holds nothing secret.

    ``orders`` are permutations that were found in the weights and cannot be drawn again from the secret. ``marks`` are
    a few entries of the original's tensors, by name, by which to know it again; the fingerprint leaves them out, and a
    passphrase does not hide them.
    """

    entropy: bytes = field(repr=False)
    recipe: Mapping[str, Any]
    orders: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)

    def stream(self) -> Stream:
        """The secret random stream that every gauge of the recipe is drawn from."""
        return Stream.from_entropy(self.entropy)

    @property
    def draws(self) -> Draws:
        return Draws(self.stream(), self.orders)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that identify this key and recipe, and say nothing about the secret."""
        digest = hashlib.blake2b(_canonical(self.recipe), key=self.entropy, digest_size=16, person=b"unmergeable-id")
        digest.update(pack_orders(self.orders))
        return digest.hexdigest()


def write_key(path: Path, key: Key, passphrase: str | None = None) -> None:
    """Create the key file, readable by its owner only; it is on disk when this returns, and never there in part.

    Raises:
        KeyFileError: something is already at ``path``, it cannot be created, or the passphrase is empty.
        DiskError: the disk is full or has failed.
    """
    text = _text_of(path, key, passphrase)
    try:
        create_whole(path, text, is_private=True)
    except FileExistsError:
        raise KeyFileError(f"key file {path} exists and is never overwritten; name another, or move it away.") from None
    except OSError as error:
        if is_disk_failure(error):
            raise write_error(path, error) from None
        raise KeyFileError(f"key file {path} cannot be created: {error.strerror}; choose another place.") from None


def change_passphrase(path: Path, old: str | None, new: str | None) -> Key:
    """Encrypt the secret anew; ``new`` None leaves it unencrypted. At any moment the file is the old one or the new.

    Raises:
        KeyFileError: as :func:`read_key`, with the ``old`` passphrase, or the new one is empty.
        DiskError: it cannot be written; the old file stays.
    """
    key = read_key(path, old)
    replace_file(path.resolve(), _text_of(path, key, new), is_private=True)
    return key


def _text_of(path: Path, key: Key, passphrase: str | None) -> bytes:
    if passphrase == "":
        raise KeyFileError(f"key file {path}: the passphrase is empty and would protect nothing; give one, or None.")
    document: dict[str, Any] = {"format": FORMAT, "fingerprint": key.fingerprint, "recipe": dict(key.recipe)}
    if key.marks:
        document["marks"] = {name: list(values) for name, values in key.marks.items()}
    if passphrase is None:
        document["secret"] = base64.b64encode(key.entropy + pack_orders(key.orders)).decode()
    else:
        document["encrypted_secret"] = _encrypt(key, passphrase)
    return (json.dumps(document, indent=2) + "\n").encode()


def read_key(path: Path, passphrase: str | None = None) -> Key:
    """Read a key file back.

    Raises:
        KeyFileError: missing, readable by others or not one's own, damaged, or the passphrase is wrong or not given.
    """
    remove_leftovers(path)  # a run that was killed while it made the key may have left a second copy of the secret
    document = _read_document(path)
    recipe = document.get("recipe")
    if document.get("format") != FORMAT or not isinstance(recipe, dict):
        raise _foreign(path)
    try:
        if "encrypted_secret" in document:
            secret = _decrypt(document, passphrase, path)
        else:
            secret = base64.b64decode(str(document.get("secret")), validate=True)
        marks = {str(name): [float(value) for value in values] for name, values in document.get("marks", {}).items()}
        key = Key(secret[:KEY_BYTES], recipe, unpack_orders(secret[KEY_BYTES:]), marks)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise KeyFileError(f"key file {path} is damaged; restore it from your backup.") from None
    if len(key.entropy) != KEY_BYTES or key.fingerprint != document.get("fingerprint"):
        raise KeyFileError(f"key file {path} was altered or is damaged; restore it from your backup.")
    return key


@dataclass(frozen=True)
class KeyFile:
    """What a key file says in the clear. Nobody has checked it: only reading the secret does."""

    fingerprint: str
    recipe: Mapping[str, Any]
    is_encrypted: bool


def describe_key(path: Path) -> KeyFile:
    """What can be told of a key file without its passphrase.

    Raises:
        KeyFileError: missing, readable by others or not one's own, or no key file.
    """
    document = _read_document(path)
    recipe, fingerprint = document.get("recipe"), document.get("fingerprint")
    if document.get("format") != FORMAT or not isinstance(recipe, dict) or not isinstance(fingerprint, str):
        raise _foreign(path)
    return KeyFile(fingerprint, recipe, "encrypted_secret" in document)


def _read_document(path: Path) -> dict[str, Any]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise KeyFileError(f"key file {path} does not exist; check the path.") from None
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be read: {error.strerror}.") from None
    try:
        status = os.fstat(descriptor)
        owners = {status.st_uid, path.lstat().st_uid}  # of the file, and of a link that leads to it
        if os.geteuid() != 0 and not owners <= {os.geteuid(), 0}:
            raise KeyFileError(
                f"key file {path} belongs to another user, who can exchange it; copy it and own the copy."
            )
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"key file {path} is not a regular file; check the path.")
        if status.st_mode & 0o077:
            raise KeyFileError(f"key file {path} is open to other users; run: chmod 600 {path}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be read: {error.strerror}.") from None
    finally:
        os.close(descriptor)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise _foreign(path)
    return document


def is_key(content: bytes) -> bool:
    """Whether a file of this content is a key, or holds a copy of one, whatever it is called."""
    return _IN_A_KEY.search(content) is not None


def _foreign(path: Path) -> KeyFileError:
    return KeyFileError(f"{path} is not a key file of this tool (format {FORMAT}); give the file that `protect` made.")


def _canonical(recipe: Mapping[str, Any]) -> bytes:
    return json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()


def pack_orders(orders: Mapping[str, Sequence[int]]) -> bytes:
    """A line of JSON with names and lengths, then the numbers, 4 bytes each; nothing for no orders."""
    if not orders:
        return b""
    lengths = {name: len(order) for name, order in orders.items()}
    numbers = np.concatenate([np.asarray(order, dtype="<u4") for order in orders.values()])
    return json.dumps(lengths).encode() + b"\n" + numbers.tobytes()


def unpack_orders(packed: bytes) -> dict[str, list[int]]:
    if not packed:
        return {}
    head, _, body = packed.partition(b"\n")
    lengths = {str(name): int(length) for name, length in json.loads(head).items()}
    numbers = np.frombuffer(body, dtype="<u4")
    if sum(lengths.values()) != len(numbers):
        raise ValueError("lengths do not add up")
    ends = np.cumsum(list(lengths.values()))
    return {name: part.tolist() for name, part in zip(lengths, np.split(numbers, ends[:-1]), strict=True)}


def _derive(passphrase: str, salt: bytes, cost: Mapping[str, int]) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=salt, length=32, n=cost["n"], r=cost["r"], p=cost["p"]).derive(passphrase.encode())


def _encrypt(key: Key, passphrase: str) -> dict[str, Any]:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = os.urandom(16), os.urandom(12)
    secret = AESGCM(_derive(passphrase, salt, SCRYPT)).encrypt(
        nonce, key.entropy + pack_orders(key.orders), _canonical(key.recipe)
    )
    encoded = {
        name: base64.b64encode(value).decode()
        for name, value in (("salt", salt), ("nonce", nonce), ("ciphertext", secret))
    }
    return {"kdf": KDF, **SCRYPT, "cipher": CIPHER, **encoded}


def _decrypt(document: Mapping[str, Any], passphrase: str | None, path: Path) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if passphrase is None:
        raise KeyFileError(
            f"key file {path} is encrypted; give its passphrase (--passphrase, or UNMERGEABLE_PASSPHRASE)."
        )
    box = document["encrypted_secret"]
    cost = {name: int(box[name]) for name in SCRYPT}
    if (box["kdf"], box["cipher"]) != (KDF, CIPHER) or 128 * math.prod(cost.values()) > MAX_SCRYPT_WORK:
        raise ValueError("not what this tool writes")
    salt, nonce, secret = (base64.b64decode(box[name], validate=True) for name in ("salt", "nonce", "ciphertext"))
    try:
        return AESGCM(_derive(passphrase, salt, cost)).decrypt(nonce, secret, _canonical(document["recipe"]))
    except InvalidTag:
        raise KeyFileError(
            f"wrong passphrase for key file {path}, or the file was altered; try again, or restore it from your backup."
        ) from None
