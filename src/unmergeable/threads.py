"""Sharing the processors: our own threads work on different tensors, and each kernel of torch gets one processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_threads(threads: int | None) -> int:
    """How many threads to use: as asked, or one per processor."""
    return processors() if threads is None else threads


@contextmanager
def one_thread_per_kernel() -> Iterator[None]:
    """Run torch kernels single-threaded, and put the setting back. A context, or a decorator.

    Several threads that each start a team of OpenMP threads oversubscribe the machine, and waiting teams spin: on two
    processors the same work took three times the processor time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
