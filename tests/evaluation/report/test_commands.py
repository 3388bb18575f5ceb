"""The commands of an attack are those of its plan, and the command line understands them."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from evaluation.documents import PLAN, WORST
from unmergeable.cli.app import main
from unmergeable.evaluation.report.commands import attack_commands
from unmergeable.evaluation.results import Trial


def trial(**best: Any) -> Trial:
    attack = {"recovery": "kabsch", "merge": "ties", "coefficients": [1.0, 0.25], "uses_victim": True, "cpu_seconds": 1}
    found = {**WORST, "rider": "theirs", "seed": 2, "attacks_tried": 1, "best": {"protected": {**attack, **best}}}
    return Trial.from_json(found)


def test_protect_recover_merge() -> None:
    against = "--base '<base> & more'"
    assert attack_commands(PLAN, "lock", trial()) == [
        f"unmergeable protect 'my model' {against} --method mergelock --set condition=9 --seed 2 --key release.key "
        "--out release",
        f"unmergeable recover release {against} --method kabsch --out recovered",
        f"unmergeable merge {against} --expert recovered=1 --expert t=0.25 --method ties --out merged",
    ]


def test_less_where_less_was_done() -> None:
    unrecovered = attack_commands(PLAN, "lock", trial(recovery=None))
    assert [command.split()[1] for command in unrecovered] == ["protect", "merge"]
    assert "--expert release=1" in unrecovered[1]
    (without_victim,) = attack_commands(PLAN, "lock", trial(uses_victim=False, merge="task_arithmetic"))
    assert "--expert t=0.25 --method task_arithmetic" in without_victim
    assert "my model" not in without_victim
    (unweighted,) = attack_commands(PLAN, "identity", trial(recovery=None, coefficients=None))
    assert "--expert 'my model' --expert t " in unweighted, "a control that is the expert itself"


def test_training_is_said() -> None:
    *commands, remark = attack_commands(PLAN, "lock", trial(samples=16, learning_rate=1e-4))
    assert commands == attack_commands(PLAN, "lock", trial())
    assert remark.startswith("# then 16 labelled examples")
    assert "0.0001" in remark


def test_what_methods_read_is_named() -> None:
    reading = {
        "name": "shield",
        "method": "sensitivity_shield",
        "data": "d.jsonl",
        "head": "h",
        "siblings": ["s 1", "s2"],
    }
    plan = {**PLAN, "protect": {"expert": "mine", "methods": [reading]}}
    protect, *_ = attack_commands(plan, "shield", trial())
    assert "--method sensitivity_shield --data d.jsonl --head h --sibling 's 1' --sibling s2" in protect
    assert "--key" not in protect, "there is none to keep"


def test_recoveries_of_several_steps_are_several_commands() -> None:
    against = "--base '<base> & more'"
    expected = [
        f"unmergeable recover release {against} --method taylor_inversion --out recovered-1",
        f"unmergeable recover recovered-1 {against} --method source_subtraction --source s --out recovered",
    ]
    steps: list[Any] = [{"method": "taylor_inversion"}, {"method": "source_subtraction"}]
    for entry, name in (
        ({"steps": steps, "sources": ["s"]}, "taylor_inversion, then source_subtraction"),
        ({"name": "both", "steps": ["taylor_inversion", steps[1]], "sources": ["s"]}, "both"),
    ):
        _, *recover, _ = attack_commands({**PLAN, "recoveries": ["kabsch", entry]}, "lock", trial(recovery=name))
        assert recover == expected
    chain = "taylor_inversion, nearest_orbit"
    _, *recover, _ = attack_commands({**PLAN, "recoveries": [chain]}, "lock", trial(recovery=chain))
    assert [command.split("--method ")[1] for command in recover] == [
        "taylor_inversion --out recovered-1",
        "nearest_orbit --out recovered",
    ]


def test_the_command_line_understands_them(capsys: pytest.CaptureFixture[str]) -> None:
    """It complains about the paths, which are made up, and about nothing else."""
    plan = {**PLAN, "base": "no-such-base"}
    for command in attack_commands(plan, "lock", trial()):
        assert main(shlex.split(command)[1:]) == 3
        assert "does not exist" in capsys.readouterr().err
    assert main(["merge", "--no-such-option"]) == 2  # control


def test_coefficients_of_parts_are_said() -> None:
    """No command merges by parts: what was done stands there in words."""
    found = trial(merge="task_arithmetic, by part", coefficients=(1.0, 0.5, 2.0, 0.25, 0.75))
    assert attack_commands(PLAN, "lock", found)[-1] == (
        "# then 1 of attention, early, 0.5 of attention, late, 2 of feed-forward, early, 0.25 of feed-forward, late "
        "and 0.75 of theirs are added to the base by the audit itself"
    )
