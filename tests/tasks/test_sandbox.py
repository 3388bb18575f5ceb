"""Programs that behave, and programs that do not: what they reach, what they use, and what is left of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmergeable.errors import UsageError
from unmergeable.settings import configure
from unmergeable.tasks import sandbox
from unmergeable.tasks.sandbox import Isolation, Limits, available_isolation, run_program
from unmergeable.tasks.sandbox_child import FULL_ISOLATION

LIMITS = Limits(seconds=3, memory_megabytes=256, file_megabytes=2, processes=8)

isolated = pytest.mark.skipif(
    available_isolation() != FULL_ISOLATION, reason="this system does not let programs be isolated"
)


def passes(program: str, *, isolation: Isolation = "where_allowed") -> bool:
    return run_program(program, LIMITS, isolation=isolation).has_ended


@pytest.mark.parametrize("isolation", ["where_allowed", "none"])
def test_a_program_that_ends_and_some_that_do_not(isolation: Isolation) -> None:
    assert passes("import math\nassert math.sqrt(4) == 2\nprint('x' * 10**6)", isolation=isolation)
    assert not passes("assert False", isolation=isolation)
    assert not passes("this is no program", isolation=isolation)
    assert not passes("import sys; sys.exit(0)", isolation=isolation), "to leave before the tests is not to pass them"
    assert not passes("import os; os._exit(0)", isolation=isolation)
    assert not passes("input()", isolation=isolation)
    assert passes("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x' * 1000)", isolation=isolation)


@pytest.mark.parametrize("isolation", ["where_allowed", "none"])
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_program_is_ended(program: str, isolation: Isolation) -> None:
    limits = Limits(seconds=1)
    began = time.monotonic()
    assert not run_program(program, limits, isolation=isolation).has_ended
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("isolation", ["where_allowed", "none"])
def test_memory_is_bounded(isolation: Isolation) -> None:
    program = "try:\n    bytearray({} << 20)\nexcept MemoryError:\n    pass\nelse:\n    raise SystemExit"
    assert passes(program.format(512), isolation=isolation)
    assert not passes(program.format(64), isolation=isolation), "control: this much there is"


@pytest.mark.parametrize("isolation", ["where_allowed", "none"])
def test_the_size_of_files_is_bounded(isolation: Isolation) -> None:
    program = "try:\n    open('x', 'wb').write(bytes({} << 20))\nexcept OSError:\n    pass\nelse:\n    raise SystemExit"
    assert passes(program.format(8), isolation=isolation)
    assert not passes(program.format(1), isolation=isolation), "control: this much there is"


FORKS = """
import os, time
children = 0
try:
    while children < 50:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        children += 1
except BlockingIOError:
    pass
assert 0 < children < 8, children
"""


@isolated
def test_a_fork_bomb_is_bounded_and_leaves_nothing() -> None:
    began = time.monotonic()
    assert passes(FORKS)
    assert not passes("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass")
    assert passes(FORKS), "what came before is gone, or there would be no room"
    assert time.monotonic() - began < 60


@isolated
def test_what_leaves_its_group_ends_too(tmp_path: Path) -> None:
    """Found by a file lock: the child of the program holds it for as long as it lives."""
    import fcntl

    lock = tmp_path / "lock"
    lock.touch()
    assert passes(
        f"import fcntl, os, time\nfile = open({str(lock)!r})\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n    os._exit(0)"
    )
    deadline = time.monotonic() + 10
    with lock.open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "a process is left"
                time.sleep(0.1)


@isolated
def test_nothing_outside_is_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    write = f"open({str(tmp_path / 'x')!r}, 'w').write('x')"
    assert not passes(write)
    assert not (tmp_path / "x").exists()
    assert passes(write, isolation="none"), "control: nothing but the isolation is in its way"


@pytest.fixture
def port() -> Iterator[int]:
    """Of somebody who listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@isolated
def test_nothing_is_reached_through_the_network(port: int) -> None:
    connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
    assert not passes(connect)
    assert passes(connect, isolation="none"), "control: somebody listens"


@isolated
def test_nothing_else_is_seen() -> None:
    assert passes("import os; assert os.listdir('/proc') == [] == os.listdir('/run')")
    assert passes("import os; assert os.getppid() == 0")


@pytest.mark.parametrize("isolation", ["where_allowed", "none"])
def test_neither_environment_nor_privileges_are_passed_on(
    isolation: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    assert passes("import os; assert 'TOKEN' not in os.environ and 'HOME' not in os.environ", isolation=isolation)
    assert passes("import os; assert os.getuid() != 0", isolation=isolation)
    give_back = "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/', None, {}, None) == -1"
    assert passes(give_back.format(32 | 4096), isolation=isolation), "what is read-only cannot be made writable again"


def test_a_program_that_cannot_be_isolated_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that refuses namespaces: the child finds the call gone. Control: it runs where that is allowed."""
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    (tmp_path / "child.py").write_text(child.replace("kernel.unshare(", "(lambda flags: -1)("))
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "child.py")
    tmp_path.chmod(0o777)
    program = f"open({str(tmp_path / 'x')!r}, 'w')"
    with pytest.raises(UsageError, match="does not isolate network and processes and files of the programs"):
        run_program(program, LIMITS)
    assert not (tmp_path / "x").exists()
    assert passes(program)


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="every limit must be at least 1"):
        configure(Limits, {"processes": 0})
