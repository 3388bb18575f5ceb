"""``unmergeable audit`` and ``unmergeable report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working


def audit(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="What is defended, by what, against what.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the audit; the same one goes on.")],
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="Processes; as many as GPUs or processors by default."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Work on a Ray cluster; local: of this machine.")
    ] = None,
) -> Outcome:
    """Find out what protections are worth against the best attack.

    Protects the expert every way of the plan, attacks each result with every recovery and merge, and reports the worst
    case: DIR/audit.json and DIR/report.html. Interrupted or killed, the same command goes on where it was.

    Exit code 1 when a control fails: the audit then found nothing out.

    Example:
      unmergeable audit plan.yaml --out ./audit
    """
    with working(context, can_resume=True) as progress:
        from unmergeable.evaluation.report import write_report
        from unmergeable.evaluation.run import audit as run
        from unmergeable.evaluation.verdict import summary

        document = run(plan, out=out, workers=workers, ray=ray, progress=progress)
        page = write_report(out)
    text = [*summary(document), f"Pictures, tables and the best attacks: {page}"]
    return Outcome({**document, "page": str(page)}, text, exit_code=0 if document["passed"] else 1)


def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of an audit.")],
    card: Annotated[bool, typer.Option("--card", help="Print the block for a model card, in Markdown.")] = False,
) -> Outcome:
    """Make the page of an audit again, from its audit.json.

    Example:
      unmergeable report ./audit
    """
    with working(context):
        from unmergeable.evaluation.report import read_audit, write_report
        from unmergeable.evaluation.verdict import model_card, summary

        page = write_report(folder)
        document = read_audit(folder)
    markdown = model_card(document)
    text = markdown.splitlines() if card else [*summary(document), f"Page: {page}"]
    return Outcome({"page": str(page), "passed": document["passed"], "card": markdown}, text)
