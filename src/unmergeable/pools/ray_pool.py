"""Work shared among the processors of a Ray cluster, by actors that stay warm (https://docs.ray.io).

The same calls as in :mod:`unmergeable.pools.pool`, with the same results. Everything is read from files and
written to files, so the machines of a cluster must see the checkpoints, the data and the output under the same paths.

What a cluster gets to see of a call: arguments of less than 100 KiB travel inside it, from this process straight to
the actor's; larger ones go through the object store, which is shared memory and may be written to a disk. So each
argument is passed on by itself, and a secret stays small. None is given when an actor is made: that is told to the
cluster's head.
"""

from __future__ import annotations

import importlib
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from unmergeable.errors import UsageError
from unmergeable.pools.pool import ATTEMPTS, Call, died_too_often

LOCAL = "local"
"""The address that starts a cluster of this machine alone, for as long as the pool lasts."""

_PATIENCE = 10.0  # seconds
_AGENT_PATIENCE = 120_000  # milliseconds that Ray gives its own processes to start, instead of 15 seconds
_STARTS = 3  # Ray waits for a node for half a minute whatever one says
_OBJECT_STORE_BYTES = 100 << 20  # results are small; Ray would take a third of the memory


class RayPool:
    """Runs calls in actors, one for each GPU of the cluster, or for each processor where there are no GPUs.

    Use it as a context manager: at the end no actor is left, and no cluster that it started.

    Args:
        address: of a cluster, as ``ray.init`` takes it, or ``local``.
        workers: the most actors.
        uses_gpus: whether calls compute on GPUs where there are any; otherwise there is an actor for each processor.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str, workers: int | None = None, *, uses_gpus: bool = True) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UsageError("ray is not installed; pip install 'unmergeable[ray]'") from None
        if address == LOCAL:
            patience = {"agent_register_timeout_ms": _AGENT_PATIENCE}
            place: dict[str, Any] = {
                "address": LOCAL,  # without one Ray looks for a cluster that runs here already
                "num_cpus": workers,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_system_config": patience,
            }
        else:
            place = {"address": address}
        for attempt in range(1, _STARTS + 1):
            try:
                _require_reachable(address)
                self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **place)
                break
            except Exception as error:  # Ray raises bare ones over a node that does not start in time
                self._ray.shutdown()
                if address == LOCAL and attempt < _STARTS:
                    continue
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                remedy = "the machine may be too busy" if address == LOCAL else "use --ray local"
                raise UsageError(f"--ray {address}: no cluster to work with ({reason}); {remedy}.") from None
        resources = self._ray.cluster_resources()
        gpus = resources.get("GPU", 0) if uses_gpus else 0
        self._needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        count = max(1, int(gpus or resources.get("CPU", 1)))
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
                function, arguments = call
                running[actor.do.remote(function, *arguments)] = (number, call, actor)
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
        # Spread over the machines: each brings its own disk lanes and memory.
        options = {"max_restarts": 0, "scheduling_strategy": "SPREAD", **self._needs}
        return self._ray.remote(_Worker).options(**options).remote()


def _require_reachable(address: str) -> None:
    """Raises OSError where nobody answers at HOST:PORT; Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


class _Worker:
    """What lives in an actor's process: modules, and with them all that they keep in memory."""

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)
