"""Functions a model writes, decided by unit tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.speakers import load_speaker, task_data, write_records, write_speaker
from unmergeable.errors import BadInput, UnmergeableError, UsageError
from unmergeable.settings import configure
from unmergeable.tasks import Code, sandbox
from unmergeable.tasks.answers import Answering
from unmergeable.tasks.code import Exercise
from unmergeable.tasks.sandbox import Limits, run_program

PROMPT = 'from math import pi\n\n\ndef double(x):\n    """Twice as much."""\n'
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(pi) == 2 * pi\n"
EXERCISE = Exercise(PROMPT, TESTS, "double")

ANSWERS = {
    "continued": ("    return 2 * x", True),
    "wrong": ("    return x + 2", False),
    "no answer": ("", False),
    "nonsense": ("because it is", False),
    "whole": ("def double(x):\n    return x + x", True),
    "fenced": ("Sure!\n```python\ndef double(x):\n    return x + x\n```\nThis doubles x.", True),
    "fence left open": ("```\ndef double(x):\n    return x + x", True),
    "fenced continuation": ("```python\n    return 2 * x\n```", True),
    "another function": ("```python\ndef triple(x):\n    return 3 * x\n```", False),
    "leaves before the tests": ("    return 2 * x\n\nimport sys\nsys.exit(0)", False),
}


@pytest.mark.parametrize(("answer", "is_right"), ANSWERS.values(), ids=list(ANSWERS))
def test_answers(answer: str, is_right: bool) -> None:
    assert run_program(EXERCISE.program(answer), Limits(), isolation="where_allowed").has_ended is is_right


def test_tests_may_name_the_function_themselves() -> None:
    exercise = Exercise("Write a function that doubles.", "assert double(2) == 4", "")
    assert run_program(
        exercise.program("def double(x):\n    return 2 * x"), Limits(), isolation="where_allowed"
    ).has_ended
    assert not run_program(
        exercise.program("def double(x):\n    return 3 * x"), Limits(), isolation="where_allowed"
    ).has_ended


@pytest.fixture
def records(tmp_path: Path) -> Path:
    row = {"prompt": PROMPT, "test": TESTS, "entry_point": "double", "canonical_solution": "    return 2*x"}
    listed = {"prompt": "double", "test": ["x = 1", "assert double(x) == 2"]}
    return write_records(tmp_path / "x.jsonl", [row, row, listed])


def test_credits_and_losses(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model says is put in its mouth; a random one writes no function."""
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    kind = configure(Code, {"max_new_tokens": 3, "isolation": "where_allowed"})
    scorer = kind.scorer(task_data(folder, records), network)
    np.testing.assert_array_equal(scorer.credits(network), [0, 0, 0])
    losses = scorer.losses(network)
    assert losses[0] == losses[1] > 0
    assert np.isnan(losses[2])
    said = ["    return 2 * x", "    return 3 * x", "def double(x): return 2 * x"]
    monkeypatch.setattr(Answering, "answers", lambda *arguments, **options: said)
    np.testing.assert_array_equal(scorer.credits(network), [1, 0, 1])
    assert "isolation" in kind.facts()


def test_a_system_that_does_not_isolate_is_refused(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    (tmp_path / "child.py").write_text(child.replace("kernel.unshare(", "(lambda flags: -1)("))
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "child.py")
    with pytest.raises(UsageError, match="does not isolate network and processes and files of the programs"):
        Code().scorer(task_data(tmp_path, records), None)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x"}, "no tests under 'test'"),
        ({"prompt": "x", "test": [1]}, "no tests under 'test'"),
        ({"prompt": "x", "test": "y", "entry_point": "a b"}, "'entry_point' is 'a b'; it must be the name of a"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [record]))
    with pytest.raises(BadInput) as error:
        Code(isolation="where_allowed").scorer(data, load_speaker(folder))
    assert str(error.value).startswith(f"{data.source.path}:1: ")
    assert message in str(error.value)


@pytest.mark.parametrize("settings", [{"processes": 0}, {"seconds": 0}, {"isolation": "no"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnmergeableError):
        configure(Code, settings)
