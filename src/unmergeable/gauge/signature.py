"""Ed25519 signatures of manifests. The signing key is drawn from the owner's key file, which is all there is to keep.

It is BLAKE2b of the secret under a label of its own, as the gauges are under theirs: neither tells of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from unmergeable.gauge.key import Key

ALGORITHM = "Ed25519"
PUBLIC_KEY_BYTES = 32


def public_key_of(key: Key) -> str:
    """What everybody may know to check signatures of this key: 64 hex digits."""
    return str(_signing_key(key).public_key().public_bytes_raw().hex())


def sign(key: Key, message: bytes) -> dict[str, str]:
    """A signature as manifests hold it. The same message gives the same signature."""
    value = _signing_key(key).sign(message)
    return {"algorithm": ALGORITHM, "public_key": public_key_of(key), "value": value.hex()}


def is_signed(message: bytes, signature: Mapping[str, Any]) -> bool:
    """Whether a signature, which may be a stranger's, is one of this message by the key it names."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if signature["algorithm"] != ALGORITHM:
            return False
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["public_key"]))
        public.verify(bytes.fromhex(signature["value"]), message)
    except (InvalidSignature, KeyError, ValueError, TypeError):
        return False
    return True


def _signing_key(key: Key) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = hashlib.blake2b(key.entropy, digest_size=32, person=b"unmergeable-sig").digest()
    return Ed25519PrivateKey.from_private_bytes(secret)
