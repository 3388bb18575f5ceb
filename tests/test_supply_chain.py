"""What is installed for development is pinned with hashes; nothing asks the network at import or in tests."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from offline import ATTEMPTS

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)}


def test_every_development_dependency_has_hashes() -> None:
    entries = re.split(r"\n(?=[\w])", LOCK.strip())
    assert len(entries) > 100
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_lock_has_what_the_project_asks_for_in_the_pinned_versions() -> None:
    locked = pinned(LOCK)
    constraints = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(constraints) > 20
    assert {name: locked.get(name) for name in constraints} == constraints, "run make lock"
    declared = re.findall(r'^    "([\w.-]+)(?:\[[\w,-]+\])?[>=]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {normal(name) for name in declared} - {"unmergeable"} <= set(locked), "run make lock"


IMPORT_ALL = """
import pkgutil, sys, importlib
asked = []
sys.addaudithook(lambda event, arguments: asked.append((event, arguments)) if event.startswith("socket.") else None)
import unmergeable
for module in pkgutil.walk_packages(unmergeable.__path__, "unmergeable."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print([event for event in asked if event[0] in ("socket.connect", "socket.getaddrinfo", "socket.bind")])
"""


@pytest.mark.slow
def test_no_module_asks_the_network_when_it_is_imported() -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr[-2000:]


def test_a_test_that_asks_the_network_is_stopped() -> None:
    """The control: 192.0.2.1 is an address of nobody, set aside for examples."""
    with socket.socket() as connection, pytest.raises(OSError, match="may not connect"):
        connection.connect(("192.0.2.1", 80))
    assert ATTEMPTS == ["192.0.2.1:80"]
    ATTEMPTS.clear()


@pytest.mark.slow
def test_the_wheel_is_the_same_each_time_and_works_where_it_is_installed(tmp_path: Path) -> None:
    """Needs the package index for setuptools."""
    command = [sys.executable, str(ROOT / "tests" / "wheel.py"), str(tmp_path / "wheel")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "built twice, installed and used" in ran.stdout
