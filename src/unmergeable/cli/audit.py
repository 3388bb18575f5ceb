"""``unmergeable audit`` and ``unmergeable report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import PlanOutOption, RootOption, WorkersOption


def audit(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="Plan: the expert, protections, attacks, tasks.")],
    out: PlanOutOption,
    root: RootOption = None,
    workers: WorkersOption = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster; local starts one on this machine."),
    ] = None,
) -> Outcome:
    """Measure what protections are worth against the best attack.

    Protects the expert with every method of the plan, attacks each result with every recovery and merge, and reports
    the worst case: DIR/audit.json and DIR/report.html. Interrupted or killed, the same command resumes.

    Exits 1 if a control fails; the results are then invalid.

    Example:
      unmergeable audit plan.yaml --out ./audit
    """
    with working(context, can_resume=True) as progress:
        from unmergeable import evaluation

        result = evaluation.audit(plan, out=out, root=root, workers=workers, ray=ray, progress=progress)
        page = evaluation.write_report(out)
    text = [*evaluation.summary(result), f"Pictures, tables and the best attacks: {page}"]
    return Outcome({**result.to_json(), "page": str(page)}, text, exit_code=0 if result.passed else 1)


def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output directory of an audit.")],
    card: Annotated[bool, typer.Option("--card", help="Print the block for a model card, in Markdown.")] = False,
) -> Outcome:
    """Write the report of an audit again, from its audit.json.

    Example:
      unmergeable report ./audit
    """
    with working(context):
        from unmergeable import evaluation

        page = evaluation.write_report(folder)
        result = evaluation.read_audit(folder)
    markdown = evaluation.model_card(result)
    text = markdown.splitlines() if card else [*evaluation.summary(result), f"Page: {page}"]
    return Outcome({"page": str(page), "passed": result.passed, "card": markdown}, text)
