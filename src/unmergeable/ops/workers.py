"""Moved to :mod:`unmergeable.threads`."""

from unmergeable.threads import one_thread_per_kernel, worker_threads

__all__ = ["one_thread_per_kernel", "worker_threads"]
