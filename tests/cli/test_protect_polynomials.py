"""``protect`` with a method that has no key: what it asks the library for, what it refuses, what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from unmergeable.api import polynomials
from unmergeable.cli.protect_polynomials import POLYNOMIAL_METHODS
from unmergeable.protections import POLYNOMIAL_PROTECTIONS

from .conftest import RecordingApi, Run


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> RecordingApi:
    recording = RecordingApi()
    monkeypatch.setattr(polynomials, "protect_with_polynomials", recording.protect_with_polynomials)
    return recording


REQUEST = ("protect", "expert", "--base", "base", "--out", "release")


def answer() -> SimpleNamespace:
    measured = {"output_error": 0.00123, "outside_mean": 0.001, "outside_largest": 0.02}
    return SimpleNamespace(
        out=Path("release"),
        method="taylor_mlp",
        architecture="llama",
        errors={"mlp": {"largest": 0.25, "median": 0.01}},
        approximation=SimpleNamespace(to_json=lambda: measured),
        note="Does not stop somebody who knows the method.",
        to_json=lambda: {"approximation": measured},
    )


def test_the_names_are_those_of_the_registry() -> None:
    assert set(POLYNOMIAL_METHODS) == set(POLYNOMIAL_PROTECTIONS)


def test_passes_the_request_on_and_says_what_was_measured(library: RecordingApi, run: Callable[..., Run]) -> None:
    library.answer = answer()
    done = run(*REQUEST, "--method", "taylor_mlp", "--data", "mine.jsonl", "--set", "order=6", "--threads", 2)

    assert done.exit_code == 0, done.stderr
    ((name, (expert,), options),) = library.calls
    assert (name, expert) == ("protect_with_polynomials", Path("expert"))
    assert {key: options[key] for key in ("base", "out", "method", "data", "settings", "threads")} == {
        "base": Path("base"),
        "out": Path("release"),
        "method": "taylor_mlp",
        "data": Path("mine.jsonl"),
        "settings": {"order": "6"},
        "threads": 2,
    }
    assert "1.2e-03 relative" in done.stdout
    assert "0.10%, 2.00% in one layer" in done.stdout
    assert "trust_remote_code=True" in done.stdout
    assert "unmergeable recover release --base base --method taylor_inversion --out release-recovered" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "mergelock", "--data", "x"), "mergelock reads no data: leave out --data"),
        (("--method", "taylor_mlp,mergelock"), "stands alone: protect in two commands"),
        (("--method", "mergebarrier", "--key", "k"), "mergebarrier has no key and no dry run: leave out --key"),
        (("--method", "mergebarrier", "--seed", "0"), "leave out --seed"),
        (("--method", "taylor_mlp", "--dry-run"), "leave out --dry-run"),
    ],
)
def test_refuses_what_makes_no_sense(
    options: tuple[str, ...], message: str, library: RecordingApi, run: Callable[..., Run]
) -> None:
    done = run(*REQUEST, *options)

    assert done.exit_code == 2
    assert message in done.stderr
    assert not library.calls
