"""``unmergeable table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import PlanOutOption, RootOption, WorkersOption


def table(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="Plan: experts, protections, merges, tasks.")],
    out: PlanOutOption,
    root: RootOption = None,
    workers: WorkersOption = None,
) -> Outcome:
    """Score fixed merges of protected experts, as a paper's table does.

    Protects each expert of the plan, merges it with every group of others, and scores the merges: DIR/table.json and
    DIR/table.md. It searches for no worst case; that is what audit does. Interrupted or killed, the same command
    resumes.

    Example:
      unmergeable table plans/offline/mergelock-tables-1-3-4.yaml --root scratch/vision --out ./table
    """
    with working(context, can_resume=True) as progress:
        from unmergeable import evaluation
        from unmergeable.evaluation.report.table_page import summary
        from unmergeable.evaluation.tables import PAGE

        result = evaluation.table(plan, out=out, root=root, workers=workers, progress=progress)
    text = [*summary(result), f"Every merge and its score: {out / PAGE}"]
    return Outcome({**result.to_json(), "page": str(out / PAGE)}, text)
