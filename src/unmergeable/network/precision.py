"""In which precision a network computes: as its weights are stored, or in bfloat16 where that is as good.

Products of matrices are then rounded to 8 bits of mantissa, sums are kept in float32, and so are norms and softmaxes
(automatic mixed precision). Weights stay as they are. Processors with instructions for it, and GPUs, take a third of
the time; others more than before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from time import process_time
from typing import Literal, get_args

import torch

Precision = Literal["float32", "bfloat16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

FULL: Precision = "float32"


NOTICEABLE = 1.2
"""How many times as long as in float32 a product may take before somebody is told."""

logger = logging.getLogger(__name__)


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


def warn_if_slower(precision: Precision, device: torch.device) -> None:
    """Say that networks compute more slowly so than in float32, where this processor has no instructions for it."""
    if precision == FULL or device.type != "cpu":
        return
    times = slowdown()
    if times > NOTICEABLE:
        logger.warning(
            "this processor takes %.0f times as long for a product of matrices in %s as in float32; leave %s out.",
            times,
            precision,
            precision,
        )


@cache
def slowdown() -> float:
    """How many times as long as in float32 a product of matrices takes this processor in bfloat16, at its fastest."""
    half, full = (_seconds(torch.ones(128, 128, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    return half / full


def _seconds(matrix: torch.Tensor) -> float:
    """Processor time of ten products; the least of three tries, as the first of a process takes longer."""
    tries = []
    for _ in range(3):
        began = process_time()
        for _ in range(10):
            matrix @ matrix
        tries.append(process_time() - began)
    return max(min(tries), 1e-9)
