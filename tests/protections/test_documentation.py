"""The pages of protections name every one of them, every control and setting, with its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unmergeable.protections import CONTROLS, PROTECTIONS, ExactProtection, SensitivityShield

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "protections.md").read_text(encoding="utf-8")
SHIELD = (DOCS / "sensitivity-shield.md").read_text(encoding="utf-8")


def test_every_method_and_setting_is_documented() -> None:
    for name, method in PROTECTIONS.items():
        assert f"`{name}`" in PAGE
        if not issubclass(method, ExactProtection):
            continue  # those have a page of their own
        section = PAGE.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        for setting in dataclasses.fields(method):
            (row,) = (line for line in section.splitlines() if line.startswith("| ") and f"`{setting.name}`" in line)
            default = setting.default
            shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
            assert shown in row, (name, setting.name)
    assert all(f"`{name}`" in PAGE for name in CONTROLS)


def test_the_shield_is_documented() -> None:
    for setting in dataclasses.fields(SensitivityShield):
        (row,) = (line for line in SHIELD.splitlines() if line.startswith(f"| `{setting.name}` |"))
        default = setting.default
        assert row.split("|")[2].strip() == (f"{default:g}" if isinstance(default, float) else str(default)), (
            setting.name
        )
