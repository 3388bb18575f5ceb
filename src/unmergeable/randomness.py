"""Labelled random streams: a seed (or 32 secret bytes) and a label give the same numbers everywhere.

Every draw is SHAKE-256 output keyed by the parent's key and the label, so results do not depend on tensor
order, thread count or process, and a stream keyed with operating-system entropy is as unpredictable as its
key: knowing some draws tells nothing about the others. Uniform numbers, signs and orders are the same bits on
every platform; normal numbers up to the last digit of its logarithm and cosine.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

KEY_BYTES = 32


@dataclass(frozen=True)
class Stream:
    """A source of numbers, identified by its key. Each draw belongs to a label: ask twice, get it twice."""

    key: bytes = field(repr=False)

    @classmethod
    def from_seed(cls, seed: int) -> Stream:
        """The reproducible stream of a public seed. Not for anything that must stay secret."""
        text = str(int(seed)).encode()
        return cls(hashlib.blake2b(text, digest_size=KEY_BYTES, person=b"unmergeable-seed").digest())

    @classmethod
    def from_entropy(cls, entropy: bytes) -> Stream:
        """The stream of a secret key of 32 bytes."""
        assert len(entropy) == KEY_BYTES
        return cls(hashlib.blake2b(entropy, digest_size=KEY_BYTES, person=b"unmergeable-key").digest())

    def child(self, label: str) -> Stream:
        """An independent stream for ``label``."""
        return Stream(hashlib.blake2b(label.encode(), key=self.key, digest_size=KEY_BYTES).digest())

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        return np.frombuffer(hashlib.shake_256(self.key).digest(8 * count), dtype="<u8")

    def uniform(self, *shape: int) -> Floats:
        """Uniform in the open interval (0, 1): the odd multiples of 2^-53."""
        words = self._words(math.prod(shape))
        # One bit more would round: float64 has no room for the half, and the largest word would give 1.
        return (((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52).reshape(shape)

    def normal(self, *shape: int) -> Floats:
        """Standard normal (Box-Muller)."""
        count = math.prod(shape)
        pairs = self.uniform(2, (count + 1) // 2)
        radius, angle = np.sqrt(-2.0 * np.log(pairs[0])), 2.0 * np.pi * pairs[1]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)

    def signs(self, *shape: int) -> Floats:
        """+1.0 or -1.0 with equal probability."""
        return np.where(self.uniform(*shape) < 0.5, -1.0, 1.0)

    def permutations(self, blocks: int, size: int) -> npt.NDArray[np.int64]:
        """``blocks`` uniformly random orders of ``range(size)``, shape [blocks, size]."""
        words = self._words(blocks * size).reshape(blocks, size)
        return np.argsort(words, axis=1, kind="stable")


def new_entropy() -> bytes:
    """32 bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)
