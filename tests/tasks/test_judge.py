"""A judge is a command: what it is asked, how its verdicts count, and what is wrong with bad ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.parts import require_parts
from tasks.speakers import load_speaker, task_data, write_records, write_speaker
from unmergeable.errors import BadInput, UnmergeableError, UsageError
from unmergeable.settings import configure
from unmergeable.tasks import Judge
from unmergeable.tasks.judge import win_rates

BEGIN = "import json, sys\npairs = [json.loads(line) for line in sys.stdin]\n"
LONGEST = (
    BEGIN
    + """
for pair in reversed(pairs):
    one, other = len(pair["first"]), len(pair["second"])
    verdict = "tie" if one == other else "first" if one > other else "second"
    print(json.dumps({"id": pair["id"], "verdict": verdict}))
"""
)
FIRST = BEGIN + 'for pair in pairs: print(json.dumps({"id": pair["id"], "verdict": "first"}))\n'


def command(folder: Path, program: str) -> tuple[str, ...]:
    path = folder / "judge.py"
    path.write_text(program)
    return (sys.executable, str(path))


def test_who_is_preferred(tmp_path: Path) -> None:
    judge = command(tmp_path, LONGEST)
    found = win_rates(judge, ["?"] * 3, ["a long answer", "so", "no"], ["short", "no", "maybe"], seconds=60)
    np.testing.assert_array_equal(found, [1, 0.5, 0])


def test_a_judge_that_favours_a_place_sees_nothing(tmp_path: Path) -> None:
    found = win_rates(command(tmp_path, FIRST), ["?"] * 2, ["a", "b"], ["c", "d"], seconds=60)
    np.testing.assert_array_equal(found, [0.5, 0.5])


def test_answers_of_a_network_are_compared_with_references(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    rows = [{"prompt": "one", "answer": "x"}, {"prompt": "a longer prompt", "answer": "y" * 40}]
    kind = configure(Judge, {"command": list(command(tmp_path, LONGEST)), "max_new_tokens": 8})
    scorer = kind.scorer(task_data(folder, write_records(tmp_path / "x.jsonl", rows)), network)
    np.testing.assert_array_equal(scorer.credits(network), [1, 0])
    assert (scorer.losses(network) > 0).all()
    require_parts(scorer, network, tolerance=1e-4)
    assert kind.facts() == {"command": list(kind.command)}


BROKEN = {
    "fails": ("import sys\nsys.exit('no licence')", r"failed with exit code 1 \(no licence\); repair it"),
    "fails silently": ("import sys\nsys.exit(3)", r"failed with exit code 3 \(it said nothing\)"),
    "no JSON": ("print('first')", "line 1: 'first' is no object with id and verdict"),
    "a list": ("print('[1]')", r"line 1: '\[1\]' is no object"),
    "another word": ('print(\'{"id": 0, "verdict": "left"}\')', "id 0 with verdict 'left'; each id from 0 to 1"),
    "another id": ('print(\'{"id": 2, "verdict": "tie"}\')', "id 2 with verdict 'tie'"),
    "a list for an id": ('print(\'{"id": [0], "verdict": "tie"}\')', r"id \[0\] with verdict 'tie'"),
    "twice": ('for _ in "ab": print(\'{"id": 0, "verdict": "tie"}\')', "line 2: id 0"),
    "too few": ('print(\'{"id": 0, "verdict": "tie"}\')', "gives no verdict on id 1; it must on all 2"),
    "too slow": ("import time\ntime.sleep(60)", "took more than 1 s"),
    "no text": ("import sys\nsys.stdout.buffer.write(bytes([255]))", "something else than UTF-8"),
}


@pytest.mark.parametrize(("program", "message"), BROKEN.values(), ids=list(BROKEN))
def test_what_is_wrong_with_a_judge_is_said(program: str, message: str, tmp_path: Path) -> None:
    judge = command(tmp_path, program)
    with pytest.raises(BadInput, match=message) as error:
        win_rates(judge, ["?"], ["a"], ["b"], seconds=1 if "sleep" in program else 60)
    assert "\n" not in str(error.value)


def test_a_judge_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be run \(No such file or directory\); correct its command"):
        win_rates([str(tmp_path / "nobody")], ["?"], ["a"], ["b"], seconds=60)


@pytest.mark.parametrize("settings", [{}, {"command": [1]}, {"command": ["x"], "seconds": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnmergeableError):
        configure(Judge, settings)
