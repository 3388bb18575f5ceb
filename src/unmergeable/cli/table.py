"""``unmergeable table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working


def table(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="Which experts, protected and merged how.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the table; the same one goes on.")],
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="DIR", help="Where relative paths of the plan start; its folder by default."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="Processes; as many as GPUs or processors by default."),
    ] = None,
) -> Outcome:
    """Score fixed merges of protected experts, as a paper's table does.

    Protects each expert of the plan, merges it with every group of others, and scores the merges: DIR/table.json and
    DIR/table.md. It searches for no worst case; that is what audit does. Interrupted or killed, the same command goes
    on where it was.

    Example:
      unmergeable table plans/offline/mergelock-tables-1-3-4.yaml --root scratch/vision --out ./table
    """
    with working(context, can_resume=True) as progress:
        from unmergeable.evaluation.table import PAGE
        from unmergeable.evaluation.table import table as run
        from unmergeable.evaluation.table_page import summary

        document = run(plan, out=out, root=root, workers=workers, progress=progress)
    return Outcome(
        {**document, "page": str(out / PAGE)}, [*summary(document), f"Every merge and its score: {out / PAGE}"]
    )
