"""Moved to :mod:`unmergeable.threads`; kept until nothing imports it from here."""

from unmergeable.threads import one_thread_per_kernel, worker_threads

__all__ = ["one_thread_per_kernel", "worker_threads"]
