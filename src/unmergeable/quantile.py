"""The exact k-th largest magnitude of a stream too large to sort or to keep.

Non-negative IEEE numbers are ordered like the integers that share their bits. So the k-th largest magnitude is
found digit by digit, from the top, in base 2^16: one pass counts the leading digit of every value, which tells the
leading digit of the answer; the next pass counts the second digit of the values that share it. Two passes settle
float32 and four float64, with 2^16 counters and no sorting. Counts are integers and add up in any order, so the
answer does not depend on how the stream is cut, ordered or shared among threads.

A threshold with equals has no exact k: keeping every magnitude >= the k-th largest keeps at least k.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIGIT_BITS = 16
DIGITS = 2**DIGIT_BITS

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class KthLargest:
    """A search for the magnitude of ``rank`` (1 = largest); each pass settles 16 more bits of it.

    ``prefix`` holds the digits known so far, and ``rank`` counts among the values that share them.
    """

    rank: int
    dtype: torch.dtype = torch.float32
    prefix: int = 0
    known_bits: int = 0

    @property
    def bits(self) -> int:
        return torch.finfo(self.dtype).bits

    @property
    def is_settled(self) -> bool:
        return self.known_bits == self.bits

    def count(self, values: Tensor) -> Tensor:
        """How often each next digit occurs among the values that share the prefix: int64 of shape (2^16,).

        ``values`` are floats of ``dtype`` or narrower, of either sign; NaN counts above infinity.
        """
        keys = magnitude_bits(values.to(self.dtype))
        if self.known_bits:
            keys = _sharing_prefix(keys, self.bits - self.known_bits, self.prefix)
        digits = (keys >> (self.bits - self.known_bits - DIGIT_BITS)) & (DIGITS - 1)
        return torch.bincount(digits.reshape(-1), minlength=DIGITS)

    def narrow(self, counts: Tensor) -> "KthLargest":
        """The search after a pass whose counts add up to ``counts``."""
        at_least = counts.flip(0).cumsum(0).flip(0)  # values whose digit is >= d; falls with d
        digit = int((at_least >= self.rank).sum()) - 1
        assert 0 <= digit < DIGITS, f"rank {self.rank} among {int(counts.sum())} values"
        above = int(at_least[digit] - counts[digit])
        return replace(
            self,
            rank=self.rank - above,
            prefix=self.prefix << DIGIT_BITS | digit,
            known_bits=self.known_bits + DIGIT_BITS,
        )

    @property
    def value(self) -> float:
        """The k-th largest magnitude, exactly."""
        assert self.is_settled, f"{self.bits - self.known_bits} bits of the magnitude are not settled yet"
        return float(torch.tensor(self.prefix, dtype=_INTEGERS[self.dtype]).view(self.dtype))


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of ``|values|`` as integers of the same width, which order as the magnitudes do."""
    integers = values.contiguous().view(_INTEGERS[values.dtype])
    return integers & torch.iinfo(integers.dtype).max


def _sharing_prefix(keys: Tensor, shift: int, prefix: int) -> Tensor:
    """The keys whose bits from ``shift`` on are ``prefix``."""
    leading = keys >> shift
    if keys.device.type != "cpu":
        return keys[leading == prefix]
    # Of a few among many, numpy's comparison and selection take a fifth of the time of torch's.
    return torch.from_numpy(keys.numpy()[leading.numpy() == prefix])
