"""``unmergeable demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working

if TYPE_CHECKING:
    from unmergeable.demo.story import DemoResult


def demo(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder for the models and the page; that of an earlier demo is emptied."
        ),
    ] = Path("unmergeable-demo"),
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the training.")] = 0,
) -> Outcome:
    """Tell the whole story on a real vision model, in a few minutes.

    Trains two experts, merges them, protects one, fails to merge it, attacks the protection, merges again, restores.
    Works offline once `pip install 'unmergeable[demo]'` is done.

    Example:
      unmergeable demo --out ./unmergeable-demo
    """
    with working(context) as progress:
        from unmergeable.demo.story import run_demo

        result = run_demo(out, progress=progress, seed=seed)
    return Outcome(result.to_json(), describe(result))


def describe(result: DemoResult) -> list[str]:
    """The table of the story, what it shows, and where the page with the pictures is."""
    width = max(len(row.model) for row in result.rows)
    tasks = list(result.rows[0].scores)
    lines = ["  ".join([" " * width, *(f"{task:>10}" for task in tasks)])]
    for row in result.rows:
        scores = "  ".join(f"{100 * row.scores[task]:>{max(8, len(task) - 2)}.1f} %" for task in tasks)
        lines += [f"{row.model:<{width}}  {scores}  {row.remark}".rstrip()]
    return [*lines, "", str(result.facts["verdict"]), f"Pictures and explanations: {result.page}"]
