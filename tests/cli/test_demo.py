"""The demo's command: where it puts things, and the table it ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .conftest import Run


def test_demo_ends_in_a_table(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def run_demo(out: Path, **options: Any) -> SimpleNamespace:
        calls.append((out, options))
        rows = (
            SimpleNamespace(model="base", scores={"digits": 0.528, "animals": 0.482}, remark=""),
            SimpleNamespace(model="protected expert", scores={"digits": 1.0, "animals": 0.031}, remark="works alone"),
        )
        facts = {"verdict": "Whoever holds the base can undo it."}
        return SimpleNamespace(rows=rows, page=out / "report.html", facts=facts, to_json=lambda: {"page": str(out)})

    story = ModuleType("unmergeable.demo.story")
    story.__dict__["run_demo"] = run_demo
    monkeypatch.setitem(sys.modules, story.__name__, story)

    shown = run("demo", "--out", "there", "--seed", "3")

    assert shown.exit_code == 0
    assert (calls[0][0], calls[0][1]["seed"]) == (Path("there"), 3)
    assert shown.stdout.splitlines() == [
        "                      digits     animals",
        "base                  52.8 %      48.2 %",
        "protected expert     100.0 %       3.1 %  works alone",
        "",
        "Whoever holds the base can undo it.",
        "Pictures and explanations: there/report.html",
    ]
    assert run("demo", "--json").document == {"page": "unmergeable-demo"}
