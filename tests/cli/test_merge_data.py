"""``unmergeable merge --data``: what is passed on, and what is said about what was learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


def test_what_was_learnt_is_said_in_a_line(ops: RecordingOps, run: Callable[..., Run]) -> None:
    ops.answer = MergeResult(Path("o"), "soup", {}, (("x", 1.0), ("y", None)), 7, summary="In the soup: experts 1")
    assert run(*COMMAND, "--method", "soup").stdout.splitlines() == [
        "Merged: o (soup; 7 tensors)",
        "  1 of x",
        "  y",
        "  In the soup: experts 1",
    ]
