"""The command line in this process, in front of a library that only records what it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

import unmergeable
from unmergeable.cli import main


@dataclass(frozen=True)
class Run:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """Stdout as the one JSON object it must be."""
        document = json.loads(self.stdout)
        assert isinstance(document, dict)
        return document


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*arguments: object) -> Run:
        exit_code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(exit_code, captured.out, captured.err)

    return run


@dataclass
class RecordingOps:
    """Stands in for :mod:`unmergeable.ops`. ``answer`` is returned, called or raised by whatever is asked."""

    answer: Any = None
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer(**options) if callable(self.answer) else self.answer

        return call

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the only call."""
        ((_, _, options),) = self.calls
        return options


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> RecordingOps:
    recording = RecordingOps()
    monkeypatch.setattr(unmergeable, "ops", recording, raising=False)
    return recording


@pytest.fixture
def verdict() -> Callable[..., SimpleNamespace]:
    """The smallest answer that `verify` can print, with what it shall say in JSON."""

    def make(*, is_equal: bool = True, **document: Any) -> SimpleNamespace:
        gap = SimpleNamespace(describe=lambda: "not measured: not asked for")
        return SimpleNamespace(
            is_equal=is_equal,
            explain=lambda: "block 7 is off",
            equivalence=SimpleNamespace(blocks=(), worst=None),
            logits=gap,
            architecture="llama",
            to_json=lambda: {"equal": is_equal, **document},
        )

    return make
