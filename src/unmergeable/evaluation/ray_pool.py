"""Work shared among the processors of a Ray cluster, by actors that stay warm (https://docs.ray.io).

The same calls as in :mod:`unmergeable.evaluation.pool`, with the same results. Everything is read from files and
written to files, so the machines of a cluster must see the audit's folder, the checkpoints and the data under the same
paths.
"""

from __future__ import annotations

import importlib
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from unmergeable.errors import UsageError
from unmergeable.evaluation.pool import ATTEMPTS, Call, died_too_often

LOCAL = "local"
"""The address that starts a cluster of this machine alone, for as long as the pool lasts."""

_PATIENCE = 10.0  # seconds
_OBJECT_STORE_BYTES = 100 << 20  # results are small; Ray would take a third of the memory


class RayPool:
    """Runs calls in actors, one for each GPU of the cluster, or for each processor where there are no GPUs.

    Use it as a context manager: at the end no actor is left, and no cluster that it started.

    Args:
        address: of a cluster, as ``ray.init`` takes it, or ``local``.
        workers: the most actors.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UsageError("ray is not installed; pip install 'unmergeable[ray]'") from None
        if address == LOCAL:
            place: dict[str, Any] = {"num_cpus": workers, "object_store_memory": _OBJECT_STORE_BYTES}
        else:
            place = {"address": address}
        try:
            _require_reachable(address)
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **place)
        except (OSError, ValueError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"--ray {address}: no cluster to work with ({reason}); use --ray local.") from None
        resources = self._ray.cluster_resources()
        self._needs = {"num_gpus": 1} if resources.get("GPU") else {"num_cpus": 1}
        count = max(1, int(resources.get("GPU") or resources.get("CPU", 1)))
        self._workers = count if workers is None else min(count, workers)
        self._actors: list[Any] = []

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        self._ray.shutdown()

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Do all calls; yield the number and result of each as it is done, in any order.

        Raises:
            UnmergeableError: actors died ``ATTEMPTS`` times over the same call.
            Whatever a call raises.
        """
        self._actors += [self._started() for _ in range(min(self._workers, len(calls)) - len(self._actors))]
        waiting, idle = deque(enumerate(calls)), list(self._actors)
        attempts: dict[int, int] = {}
        running: dict[Any, tuple[int, Call, Any]] = {}
        while waiting or running:
            while waiting and idle:
                number, call = waiting.popleft()
                actor = idle.pop()
                running[actor.do.remote(*call)] = (number, call, actor)
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            number, call, actor = running.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayActorError:
                attempts[number] = attempts.get(number, 0) + 1
                if attempts[number] == ATTEMPTS:
                    raise died_too_often() from None
                self._actors.remove(actor)
                actor = self._started()
                self._actors.append(actor)
                waiting.append((number, call))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            else:
                yield number, result
            idle.append(actor)

    def _started(self) -> Any:
        return self._ray.remote(_Worker).options(max_restarts=0, **self._needs).remote()


def _require_reachable(address: str) -> None:
    """Raises OSError where nobody answers at HOST:PORT; Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


class _Worker:
    """What lives in an actor's process: modules, and with them all that they keep in memory."""

    def do(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)
