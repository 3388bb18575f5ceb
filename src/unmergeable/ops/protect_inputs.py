"""Opening what ``protect`` works on, here and in the processes that share the work."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from unmergeable.checkpoint.finite import places_of, require_finite, require_finite_at
from unmergeable.checkpoint.index import is_adapter
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.pools.pool import Call, Pool, ranges, run_all
from unmergeable.progress import Progress
from unmergeable.protections import Inputs
from unmergeable.protections.base import Elsewhere
from unmergeable.threads import one_thread_per_kernel


def open_inputs(expert: Path, base: Path, *, allow_pickle: bool | None = None) -> Inputs:
    """Both checkpoints.

    Raises:
        BadInput: one cannot be read, they do not belong together, or hold NaN.
    """
    inputs = _open(expert, base, allow_pickle)
    require_finite(_named(inputs))
    return inputs


def open_inputs_with(
    pool: Pool, expert: Path, base: Path, *, allow_pickle: bool | None, threads: int, progress: Progress
) -> Inputs:
    """As :func:`open_inputs`, where other processes look for NaN, with ``threads`` each, and share what follows.

    Raises:
        BadInput: also where a machine does not see the files.
    """
    inputs = _open(expert, base, allow_pickle)
    # The others start in folders of their own.
    reopen = _Reopen(expert.absolute(), base.absolute(), allow_pickle, run=secrets.token_hex(8))
    calls: list[Call] = [
        (_require_finite_elsewhere, (reopen, begin, end, threads))
        for begin, end in ranges(len(places_of(_named(inputs))))
    ]
    run_all(pool, calls, "looking for NaN", "parts", progress)
    return replace(inputs, elsewhere=Elsewhere(pool, reopen, threads))


def _open(expert: Path, base: Path, allow_pickle: bool | None) -> Inputs:
    """Both checkpoints, headers only."""
    source, architecture = open_with_architecture(expert, base=base, allow_pickle=allow_pickle)
    origin = open_base(base, source, architecture, allow_pickle=allow_pickle)
    return Inputs(source, origin, architecture, template=base if is_adapter(expert) else expert, base_folder=base)


def _named(inputs: Inputs) -> dict[str, TensorSource]:
    return {f"expert {inputs.expert.description}": inputs.expert, f"base {inputs.base.description}": inputs.base}


@dataclass(frozen=True)
class _Reopen:
    """Opens the checkpoints of a run in another process; ``run`` tells it from any other run with the same paths."""

    expert: Path
    base: Path
    allow_pickle: bool | None
    run: str

    def __call__(self) -> Inputs:
        try:
            return _open(self.expert, self.base, self.allow_pickle)
        except BadInput as error:
            raise BadInput(f"{socket.gethostname()} does not see what this machine sees: {error}") from None


@lru_cache(maxsize=1)
def _opened_elsewhere(reopen: _Reopen) -> Inputs:
    return reopen()


@one_thread_per_kernel()
def _require_finite_elsewhere(reopen: _Reopen, begin: int, end: int, threads: int) -> None:
    require_finite_at(places_of(_named(_opened_elsewhere(reopen)))[begin:end], threads=threads)
