"""``unmergeable merge --data``: what is passed on, and what is said about what was learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from unmergeable.cli.merge import describe_learnt
from unmergeable.ops.merging import MergeResult

from .conftest import RecordingOps, Run

COMMAND = ("merge", "--base", "b", "--expert", "x", "--expert", "y", "--out", "o")


def test_data_keep_their_order(ops: RecordingOps, run: Callable[..., Run]) -> None:
    ops.answer = MergeResult(Path("o"), "fisher", {}, (("x", 1.0), ("y", 1.0)), 7, learnt={"data": ["q.txt", "p.npz"]})
    done = run(*COMMAND, "--method", "fisher", "--data", "q.txt", "--data", "p.npz", "--json")
    assert ops.options["data"] == [Path("q.txt"), Path("p.npz")]
    assert done.document["learnt"] == {"data": ["q.txt", "p.npz"]}


def test_a_merge_without_data_has_learnt_nothing(ops: RecordingOps, run: Callable[..., Run]) -> None:
    ops.answer = MergeResult(Path("o"), "ties", {}, (("x", 1.0),), 7)
    assert run(*COMMAND, "--method", "ties", "--json").document["learnt"] is None


def test_a_soup_says_what_is_in_it() -> None:
    trials = [
        {"experts": [2], "score": 0.8, "kept": True},
        {"experts": [2, 1], "score": 0.85, "kept": True},
        {"experts": [2, 1, 3], "score": 0.5, "kept": False},
    ]
    assert describe_learnt({"soup": [2, 1], "trials": trials}) == [
        "  In the soup: experts 2, 1 (score 0.8500; the best alone 0.8000)"
    ]


def test_adamerging_says_what_it_won() -> None:
    learnt = {"entropies": [[1.0, 2.0], [0.5, 1.0]], "coefficients": {"a": [0.2, 0.4], "b": [0.4, 0.8]}}
    assert describe_learnt(learnt) == ["  Entropy 1.500 -> 0.750 nats; mean coefficients 0.300, 0.600"]
    assert describe_learnt({"data": ["p"]}) == []
