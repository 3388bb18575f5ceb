"""In which precision a network computes: as its weights are stored, or in bfloat16 where that is as good.

Products of matrices are then rounded to 8 bits of mantissa, sums are kept in float32, and so are norms and softmaxes
(automatic mixed precision). Weights stay as they are. Processors with instructions for it, and GPUs, take a third of
the time; others more than before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Precision = Literal["float32", "bfloat16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

FULL: Precision = "float32"


def dtype_of(precision: Precision) -> torch.dtype:
    """That of products of matrices."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside, networks on the device compute so."""
    is_mixed = precision != FULL
    with torch.autocast(device.type, dtype=dtype_of(precision) if is_mixed else None, enabled=is_mixed):
        yield
