"""The commands: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.cli.app import main


def test_audit_and_report(small_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "audit"
    assert main(["audit", str(small_plan), "--out", str(out), "--workers", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("page") == str(out / "report.html")
    assert shown == json.loads((out / "audit.json").read_text())

    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert "ordinary merging" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    assert main(["report", str(out), "--card"]) == 0
    assert capsys.readouterr().out.startswith("| protection |")


def test_a_failed_control_is_a_failure(
    small_plan: Path, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document["coefficients"]["defended"] = [0.3, 1.0]
    small_plan.write_text(yaml.safe_dump(document))
    assert main(["audit", str(small_plan), "--out", str(tmp_path / "audit"), "--workers", "1"]) == 1
    assert capsys.readouterr().out.startswith("INVALID: control scale")


def test_what_is_wrong_takes_one_line(
    small_plan: Path, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document["mergse"] = document.pop("merges")
    small_plan.write_text(yaml.safe_dump(document))
    assert main(["audit", str(small_plan), "--out", str(tmp_path / "audit")]) == 3
    message = capsys.readouterr().err.strip()
    assert "did you mean 'merges'" in message
    assert "\n" not in message
    assert not (tmp_path / "audit").exists()
    assert main(["report", str(tmp_path)]) == 3
