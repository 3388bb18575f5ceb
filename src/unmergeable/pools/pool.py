"""Work shared among processes that stay warm; a process that dies is replaced and its work done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from typing import Any, Protocol

from unmergeable.devices import count_gpus, see_one_gpu
from unmergeable.errors import UnmergeableError
from unmergeable.progress import Progress

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function that can be imported, and its arguments."""

PARTS = 64
"""Into how many calls work on many small things is divided: enough to even out the load of a cluster."""

ATTEMPTS = 3
"""How often work is begun that kills its process."""


class Pool(Protocol):
    """Where calls are run: a context manager, after which nothing of it is left."""

    def __enter__(self) -> Pool: ...

    def __exit__(self, *exception: object) -> None: ...

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Do all calls; yield the number and result of each as it is done, in any order."""
        ...


class WorkerPool:
    """Runs calls in ``workers`` processes, which keep what they have loaded from one batch of calls to the next.

    None is one for each GPU, or for each processor where there are no GPUs. One worker is the calling process. Use it
    as a context manager: at the end no process is left.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._gpus = count_gpus()
        self._workers = workers or self._gpus or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Do all calls; yield the number and result of each as it is done, in any order.

        Raises:
            UnmergeableError: processes died ``ATTEMPTS`` times over the same calls, for want of memory most likely.
        """
        if self._workers == 1:
            for number, (function, arguments) in enumerate(calls):
                yield number, function(*arguments)
            return
        waiting = dict(enumerate(calls))
        for _ in range(ATTEMPTS):
            for number, result in self._attempt(waiting):
                del waiting[number]
                yield number, result
            if not waiting:
                return
        raise died_too_often()

    def _attempt(self, calls: dict[int, Call]) -> Iterator[tuple[int, Any]]:
        """Yield results until all are there or a process dies."""
        pool = self._started()
        futures: dict[Future[Any], int] = {
            pool.submit(function, *arguments): number for number, (function, arguments) in calls.items()
        }
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                is_broken = False
                for future in done:
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        is_broken = True
                        continue
                    yield futures[future], result
                if is_broken:
                    self._stop()
                    return
        except BaseException:
            self._stop()
            raise

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of torch's threads
            numbers = context.SimpleQueue()
            for number in range(self._workers):
                numbers.put(number)
            self._pool = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_begin, initargs=(numbers, self._gpus)
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def ranges(count: int) -> list[tuple[int, int]]:
    """``range(count)`` in at most ``PARTS`` contiguous parts of nearly the same length: the begin and end of each."""
    parts = min(count, PARTS)
    ends = [count * part // parts for part in range(parts + 1)] if parts else []
    return list(pairwise(ends))


def run_all(pool: Pool, calls: Sequence[Call], stage: str, unit: str, progress: Progress) -> list[Any]:
    """What all calls give, in their order."""
    outcomes: dict[int, Any] = {}
    progress(stage, 0, len(calls), unit)
    for number, outcome in pool.run(calls):
        outcomes[number] = outcome
        progress(stage, len(outcomes), len(calls), unit)
    return [outcomes[number] for number in range(len(calls))]


def died_too_often() -> UnmergeableError:
    """The error for work that kills whoever does it."""
    return UnmergeableError(
        f"a worker died {ATTEMPTS} times over the same work: it may need more memory than there is; use fewer "
        "--workers."
    )


def _begin(numbers: multiprocessing.SimpleQueue[int], gpus: int) -> None:
    """What a new process does first: see one GPU, end at Ctrl-C without a word, and watch its parent."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    if gpus:
        see_one_gpu(numbers.get(), gpus)
    _die_with_parent()


def _die_with_parent() -> None:
    """A parent that is killed cannot stop its workers; without this they would go on for as long as a sweep takes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="unmergeable-parent", daemon=True).start()
