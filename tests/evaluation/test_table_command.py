"""``unmergeable table``: what it prints, and its exit codes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.cli.app import main


@pytest.fixture
def small_plan(table_document: dict[str, Any], tmp_path: Path) -> Path:
    """Away from the models: its paths start where ``--root`` says."""
    document = copy.deepcopy(table_document)
    document["protect"] = {"experts": ["mine"], "methods": ["mergelock"]}
    document |= {"recoveries": [], "partners": [1], "merges": ["ties"]}
    document["published"] = {"mergelock / ties": 3.4}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_table(small_plan: Path, trio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table"
    arguments = ["table", str(small_plan), "--root", str(trio), "--out", str(out), "--workers", "1"]
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("page") == str(out / "table.md")
    assert shown == json.loads((out / "table.json").read_text())

    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    plain, hidden = (100 * shown["figures"][f"{variant} / ties"] for variant in ("unprotected", "mergelock"))
    assert lines[0] == f"unprotected / ties: {plain:.1f} %"
    assert lines[1] == f"mergelock / ties: {hidden:.1f} %, {hidden - plain:+.1f} points to unprotected"
    assert lines[2].endswith(str(out / "table.md"))


def test_what_is_wrong_takes_one_line(
    small_plan: Path, trio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = small_plan.read_text()
    small_plan.write_text(text.replace("merges:", "mergse:"))
    out = tmp_path / "table"
    assert main(["table", str(small_plan), "--root", str(trio), "--out", str(out)]) == 3
    message = capsys.readouterr().err.strip()
    assert "did you mean 'merges'" in message
    assert "\n" not in message
    assert not out.exists()

    small_plan.write_text(text)
    out.mkdir()
    (out / "holiday.jpg").touch()
    assert main(["table", str(small_plan), "--root", str(trio), "--out", str(out)]) == 3
    assert "not the folder of an earlier table" in capsys.readouterr().err
