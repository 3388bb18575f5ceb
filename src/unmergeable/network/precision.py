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


@contextmanager
def computing_in(precision: Precision, device: torch.device, *, keeps_rounded: bool = True) -> Iterator[None]:
    """Inside, networks on the device compute so.

    Args:
        precision: of products of matrices.
        device: of the networks.
        keeps_rounded: whether a weight is rounded once for the whole context. Torch does not see that a weight's
            ``data`` are others than before: where weights change inside, each use has to round them again.
    """
    is_mixed = precision != FULL
    dtype = torch.bfloat16 if is_mixed else None
    with torch.autocast(device.type, dtype=dtype, enabled=is_mixed, cache_enabled=keeps_rounded):
        yield
