"""The pages of protections name every one of them, every control and setting, with its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unmergeable.defaults import RELEASE_SETTINGS
from unmergeable.protections import CONTROLS, PROTECTIONS, ExactProtection, SensitivityShield
from unmergeable.protections.trained import TrainedProtection

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
            default = RELEASE_SETTINGS.get(name, {}).get(setting.name, setting.default)
            shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
            assert shown in row, (name, setting.name)
    assert all(f"`{name}`" in PAGE for name in CONTROLS)


def test_trained_protections_are_documented() -> None:
    trained = {name: method for name, method in PROTECTIONS.items() if issubclass(method, TrainedProtection)}
    assert len(trained) == 3
    fine_tuned = (DOCS / "fine-tuned.md").read_text(encoding="utf-8")
    pages = {"collapse": (DOCS / "collapse.md").read_text(encoding="utf-8")}
    for name, method in trained.items():
        page = pages.get(name) or fine_tuned.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        for setting in dataclasses.fields(method):
            (row,) = (line for line in page.splitlines() if line.startswith(f"| `{setting.name}` |"))
            shown = row.split("|")[2].strip()
            default = setting.default
            same = isinstance(default, float) and float(shown) == default
            assert same or shown == str(default).lower(), (name, setting.name)


def test_the_shield_is_documented() -> None:
    for setting in dataclasses.fields(SensitivityShield):
        (row,) = (line for line in SHIELD.splitlines() if line.startswith(f"| `{setting.name}` |"))
        default = setting.default
        assert row.split("|")[2].strip() == (f"{default:g}" if isinstance(default, float) else str(default)), (
            setting.name
        )
