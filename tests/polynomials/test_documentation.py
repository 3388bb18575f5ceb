"""docs/polynomial.md names every setting with its default, and shows the committed figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from unmergeable.attacks import TaylorInversion
from unmergeable.polynomials.layout import LAYOUTS
from unmergeable.protections import MergeBarrier, TaylorMLP

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "polynomial.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "polynomial_language_model.json").read_text())


def test_every_setting_is_documented_with_its_default() -> None:
    for name, method in ((cls.name, cls) for cls in (TaylorMLP, MergeBarrier)):
        section = PAGE.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        for setting in dataclasses.fields(method):
            (row,) = (line for line in section.splitlines() if line.startswith("| `") and f"`{setting.name}`" in line)
            default = setting.default
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert shown in row, (name, setting.name)
    inversion = TaylorInversion()
    assert f"`points` = {inversion.points}" in PAGE
    assert f"`span` = {inversion.span:g}" in PAGE


def test_figures_are_the_committed_ones() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]

    def row(beginning: str, cells: int) -> str:
        (found,) = (line for line in rows if line.startswith(beginning) and line.count("|") == cells + 1)
        return found

    for name in ("taylor_mlp", "mergebarrier"):
        result = RESULTS["methods"][name]
        line = row(f"| `{name}` |", 5)
        assert f"+{result['change']:.3f}" in line
        for kind in ("forward", "token"):
            assert f"{result['slowdown'][kind]:.1f} ×" in line
    for order in ("2", "4", "6", "8"):
        line = row(f"| {order} |", 5)
        for basis in ("taylor", "hermite"):
            for value in RESULTS["orders"][order][basis].values():
                assert f"{float(f'{value:.2g}')}" in line, (order, basis)
    for settings in ("share=0.9", "share=1", "as_published", "order=6", "order=4"):
        change = RESULTS["methods"][f"taylor_mlp {settings}"]["change"]
        lines = [line for line in rows if f"`{settings}` |" in line]
        assert any(f"+{change:.{digits}f}" in line for line in lines for digits in (1, 2, 3)), settings
    assert f"{RESULTS['original_loss']:.3f} unprotected" in PAGE


def test_families_are_named() -> None:
    families = PAGE.split("## The file")[1]
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "GPT-2", "OPT", "BERT", "ViT", "DINOv2", "T5"):
        assert family in families
    assert len(LAYOUTS) == 13
