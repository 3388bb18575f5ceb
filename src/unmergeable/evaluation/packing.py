"""Credits as short texts, so that a committed result keeps every example and anybody can compute D* again.

bits:200:gP8B…     rights and wrongs, one bit each, in base64
float64:200:eJxj…  other credits, little-endian, deflated, in base64
"""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np

from unmergeable.errors import BadInput
from unmergeable.evaluation.cells import Credits

_BITS, _FLOATS = "bits", "float64"

LONGEST = 10_000_000
"""Examples in a text that is read: more are no result of an audit."""


def pack(credits_of: Credits) -> str:
    """Credits, [examples], as a text that has every bit of them."""
    if np.isin(credits_of, (0.0, 1.0)).all():
        kind, data = _BITS, np.packbits(credits_of.astype(bool)).tobytes()
    else:
        kind, data = _FLOATS, zlib.compress(credits_of.astype("<f8").tobytes(), 9)
    return f"{kind}:{len(credits_of)}:{base64.b64encode(data).decode()}"


def unpack(text: str) -> Credits:
    """The inverse of :func:`pack`.

    Raises:
        BadInput: the text is none of those.
    """
    kind, _, rest = text.partition(":")
    count, _, data = rest.partition(":")
    try:
        length = int(count)
        if not 0 <= length <= LONGEST:
            raise ValueError(length)  # noqa: TRY301 - one message for all that is wrong
        raw = base64.b64decode(data, validate=True)
        if kind == _BITS and len(raw) == (length + 7) // 8:
            return np.unpackbits(np.frombuffer(raw, np.uint8), count=length).astype(float)
        if kind == _FLOATS:
            values = np.frombuffer(_inflated(raw, 8 * length), "<f8")
            if len(values) == length:
                return values.astype(float)
    except (ValueError, binascii.Error, zlib.error):
        pass
    raise BadInput(f"{text[:40]!r} is no packed credits; run `unmergeable audit` again.")


def _inflated(data: bytes, size: int) -> bytes:
    """At most ``size`` bytes, whatever a stranger's text would grow to."""
    return zlib.decompressobj().decompress(data, size) if size else b""
