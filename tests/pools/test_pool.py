"""Work shared among processes: complete, and begun again when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.pools.pool import ATTEMPTS, Call, WorkerPool


def run_all(calls: list[Call], workers: int) -> dict[int, Any]:
    with WorkerPool(workers) as pool:
        return dict(pool.run(calls))


def square(number: int) -> int:
    return number * number


def fail() -> None:
    raise BadInput("the work itself is wrong.")


def die(path: Path, times: int) -> str:
    """Kill the process, as running out of memory does, the first few times."""
    count = len(list(path.iterdir()))
    if count < times:
        (path / str(count)).touch()
        os._exit(9)
    return "done"


@pytest.mark.parametrize("workers", [1, 2])
def test_every_call_is_answered(workers: int) -> None:
    calls: list[Call] = [(square, (number,)) for number in range(5)]
    assert run_all(calls, workers) == {number: number * number for number in range(5)}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_passes_through(workers: int) -> None:
    with pytest.raises(BadInput, match="the work itself"):
        run_all([(fail, ())], workers)


def test_a_death_is_survived(tmp_path: Path) -> None:
    calls: list[Call] = [(die, (tmp_path, ATTEMPTS - 1)), (square, (3,))]
    assert run_all(calls, 2) == {0: "done", 1: 9}


def test_work_that_always_kills_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(UnmergeableError, match="a worker died 3 times"):
        run_all([(die, (tmp_path, 99)), (square, (3,))], 2)
    assert len(list(tmp_path.iterdir())) == ATTEMPTS


def test_processes_stay_from_batch_to_batch() -> None:
    with WorkerPool(2) as pool:
        first = set(dict(pool.run([(os.getpid, ()) for _ in range(8)])).values())
        second = set(dict(pool.run([(os.getpid, ()) for _ in range(8)])).values())
    assert os.getpid() not in first | second
    assert len(first | second) <= 2


def linger(path: Path) -> None:
    """Say which process this is, then work for a long time."""
    (path / str(os.getpid())).touch()
    time.sleep(60)


def start_lingering(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A parent in a session of its own, and its two workers, all at work."""
    code = (
        "import signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "if __name__ == '__main__':\n"
        "    from test_pool import linger, run_all\n"
        "    try:\n"
        "        run_all([(linger, (Path(sys.argv[2]),))] * 2, 2)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', file=sys.stderr)\n"
    )
    script, pids = folder / "parent.py", folder / "pids"
    script.write_text(code)
    pids.mkdir()
    command = [sys.executable, str(script), str(Path(__file__).parent), str(pids)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    workers = [int(path.name) for path in pids.iterdir()]
    assert all(map(is_running, workers))
    return parent, workers


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent, workers = start_lingering(tmp_path)
    parent.kill()
    wait_until(lambda: not any(map(is_running, workers)))
    parent.communicate()


def test_ctrl_c_ends_everything_at_once_and_without_tracebacks(tmp_path: Path) -> None:
    parent, workers = start_lingering(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)
    wait_until(lambda: not any(map(is_running, workers)))
    _, said = parent.communicate(timeout=60)
    assert said == "interrupted\n"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    """Give up after two minutes: a loaded machine has needed more than half a one to start three interpreters."""
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened")
