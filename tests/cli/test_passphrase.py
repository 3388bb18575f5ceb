"""A passphrase is typed unseen, or comes from the environment; an empty one is never taken for one."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from unmergeable.cli.passphrase import VARIABLE, read_passphrase
from unmergeable.errors import UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the user types at the prompts, in order."""
    answers: list[str] = []
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("getpass.getpass", lambda _: answers.pop(0))
    yield answers
    assert answers == [], "asked as often as expected"


def test_nobody_is_asked_without_the_switch(typed: list[str]) -> None:
    assert read_passphrase(is_asked_for=False, is_new=True) is None


def test_a_new_one_is_typed_twice(typed: list[str]) -> None:
    typed += ["correct horse", "correct horse"]

    assert read_passphrase(is_asked_for=True, is_new=True) == "correct horse"


def test_a_known_one_is_typed_once(typed: list[str]) -> None:
    typed += ["correct horse"]

    assert read_passphrase(is_asked_for=True, is_new=False) == "correct horse"


def test_two_that_differ_are_refused(typed: list[str]) -> None:
    typed += ["correct horse", "correct house"]

    with pytest.raises(UsageError, match="differ") as refused:
        read_passphrase(is_asked_for=True, is_new=True)
    assert "horse" not in str(refused.value)


def test_an_empty_one_is_refused(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed += [""]
    with pytest.raises(UsageError, match="no passphrase"):
        read_passphrase(is_asked_for=True, is_new=False)

    monkeypatch.setenv(VARIABLE, "")
    for is_asked_for in (True, False):
        with pytest.raises(UsageError, match=f"{VARIABLE} is empty"):
            read_passphrase(is_asked_for=is_asked_for, is_new=True)


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_scripts_use_the_environment(is_asked_for: bool, typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "correct horse")

    assert read_passphrase(is_asked_for=is_asked_for, is_new=True) == "correct horse"


def test_without_a_terminal_the_environment_is_named(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("piped\n"))

    with pytest.raises(UsageError, match=VARIABLE):
        read_passphrase(is_asked_for=True, is_new=False)


def test_one_that_is_not_utf8_is_refused(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "caf\udce9")  # as Python reads the bytes of another encoding
    with pytest.raises(UsageError, match="not UTF-8") as refused:
        read_passphrase(is_asked_for=False, is_new=True)
    assert "caf" not in str(refused.value)
    monkeypatch.setenv(VARIABLE, "café")
    assert read_passphrase(is_asked_for=False, is_new=True) == "café"
