"""A few changed files for every reader; `make fuzz` has thousands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fuzzing.mutators import yaml_changed
from fuzzing.run import case, fuzz, outcome
from fuzzing.targets import TARGETS, Target, prepare
from unmergeable.errors import BadInput

CASES = 12
"""Of each format; enough that most of the kinds of change of a format occur."""

KEPT: dict[str, tuple[int, ...]] = {
    "config": (656,),
    "recipe, YAML": (51,),
    "audit": (5, 352, 567, 703),
    "derived map": (3, 11, 25),
    "tokenizer": (25,),
}
"""Cases by number that once were internal errors, too large or too slow."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzing")
    prepare(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_file_is_read_or_refused_in_one_line(name: str, folder: Path) -> None:
    counts, wrong = fuzz(name, folder, CASES, seed=10_000_000)
    assert wrong == {}
    assert counts["refused"], "no change was one that matters: the test would show nothing"


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, numbers in KEPT.items() for number in numbers])
def test_what_once_went_wrong(name: str, number: int, folder: Path) -> None:
    file = folder / TARGETS[name].file
    valid = file.read_bytes()
    try:
        file.write_bytes(case(name, valid, number))
        assert outcome(TARGETS[name], folder) in ("read", "refused")
    finally:
        file.write_bytes(valid)


def test_a_few_bytes_that_stand_for_many_are_not_written_out() -> None:
    """What a fuzzer keeps is changed again: aliases of aliases would fill its memory."""
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    bomb = "\n".join(["a0: &a0 [x]", *levels]).encode()
    assert all(len(yaml_changed(bomb, Random(seed))) < 10 * len(bomb) + 6400 for seed in range(50))
    changed = {yaml_changed(b"a: [1, 2]\nb: c\n", Random(seed)) for seed in range(50)}
    assert len(changed) > 25, "the control: others are changed as documents"


def endless(folder: Path) -> None:
    while True:
        pass


def refuse(message: str) -> None:
    raise BadInput(message)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda folder: {}["x"], "internal error: KeyError"),
        (endless, "took too long"),
        (lambda folder: refuse("no"), "refused"),
        (lambda folder: None, "read"),
    ],
)
def test_what_is_wrong_is_noticed(
    read: Callable[[Path], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr("fuzzing.run.SECONDS", 0.2)
    assert outcome(Target("x", lambda data, random: data, read), tmp_path).startswith(said)
