"""docs/protections.md names every protection, control and setting, with its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unmergeable.protections import CONTROLS, PROTECTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "protections.md").read_text()


def test_every_method_and_setting_is_documented() -> None:
    for name, method in PROTECTIONS.items():
        section = PAGE.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        for setting in dataclasses.fields(method):  # type: ignore[arg-type]
            (row,) = (line for line in section.splitlines() if line.startswith("| ") and f"`{setting.name}`" in line)
            default = setting.default
            shown = str(default).lower() if isinstance(default, bool) else f"{default:g}"
            assert shown in row, (name, setting.name)
    assert all(f"`{name}`" in PAGE for name in CONTROLS)
