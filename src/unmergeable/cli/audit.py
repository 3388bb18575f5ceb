"""``unmergeable audit`` and ``unmergeable report``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import RayOption, RootOption, WorkersOption
from unmergeable.errors import UsageError


def audit(
    context: typer.Context,
    plan: Annotated[
        Path | None,
        typer.Argument(metavar="PLAN.yaml", help="Plan: the expert, protections, attacks, tasks.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Output directory; rerun with the same one to resume.")
    ] = None,
    base: Annotated[Path | None, typer.Option("--base", metavar="BASE", help="What was fine-tuned.")] = None,
    releases: Annotated[
        list[Path] | None, typer.Option("--release", metavar="PATH", help="A release to audit; repeatable.")
    ] = None,
    riders: Annotated[
        list[Path] | None, typer.Option("--rider", metavar="PATH", help="A free-rider's fine-tune of BASE; repeatable.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", metavar="PATH", help="Labelled examples of the defended task.")
    ] = None,
    rider_data: Annotated[
        list[Path] | None,
        typer.Option("--rider-data", metavar="PATH", help="Those of the rider's task, for each --rider in turn."),
    ] = None,
    expert: Annotated[
        Path | None,
        typer.Option("--expert", metavar="PATH", help="The release before it was protected; without it, no D*."),
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", metavar="FILE", help="Head of the defended task, for encoders.")
    ] = None,
    rider_heads: Annotated[
        list[Path] | None, typer.Option("--rider-head", metavar="FILE", help="Those of the riders' tasks.")
    ] = None,
    release_head: Annotated[
        Path | None, typer.Option("--release-head", metavar="FILE", help="The release's own, where its width differs.")
    ] = None,
    recovered: Annotated[
        Path | None, typer.Option("--recovered", metavar="PATH", help="Weights that you got out of the release.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--task-kind", metavar="NAME", help="Kind of the tasks.  [default: classification]")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code in the release's folder. Read it first.")
    ] = False,
    threat_models: Annotated[
        list[str] | None,
        typer.Option("--threat-model", metavar="NAME", help="An attacker; repeatable.  [default: those without data]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check models and data, say what would be done, write nothing.")
    ] = False,
    root: RootOption = None,
    workers: WorkersOption = None,
    ray: RayOption = None,
) -> Outcome:
    """Measure what protections are worth against the best attack.

    With a plan: protects the expert with every method of it, attacks each result with every recovery and merge, and
    reports the worst case: DIR/audit.json and DIR/report.html. Interrupted or killed, the same command resumes.

    Without a plan: audits somebody else's releases with the standard attacker, and writes the plan it followed to
    DIR/plan.yaml, to be edited. The data are split into what attackers learn from, select on, and are scored on.

    Exits 1 if a control fails; the results are then invalid.

    Example:
      unmergeable audit plan.yaml --out ./audit
      unmergeable audit --base ./base --release ./release --rider ./theirs --task-data ./mine.jsonl \\
        --rider-data ./theirs.jsonl --task-kind multiple_choice --out ./audit
    """
    needed = {"base": base, "release": releases, "rider": riders, "task-data": task_data, "rider-data": rider_data}
    more = (expert, head, rider_heads, release_head, recovered, kind, trust_remote_code, threat_models)
    if plan is not None and any([*needed.values(), *more]):
        raise UsageError("give either a plan, or --base, --release and the other options that stand for one.")
    missing = [f"--{name}" for name, value in needed.items() if not value]
    if plan is None and missing:
        raise UsageError(
            f"give a plan, or what stands for one: {', '.join(missing)}; --rider-data are examples of the skill that a "
            "free-rider wants to keep."
        )
    if out is None and not dry_run:
        raise UsageError("--out is missing: name the output directory, or add --dry-run.")
    with working(context, can_resume=not dry_run) as progress:
        from unmergeable import evaluation

        estimate: Callable[..., Any]
        run: Callable[..., Any]
        if plan is not None:
            estimate = partial(evaluation.estimate_audit, plan, root=root)
            run = partial(evaluation.audit, plan, root=root)
        else:
            asked = evaluation.audit_of_releases(
                base=base or "",
                releases=releases or (),
                riders=riders or (),
                task_data=task_data or "",
                rider_data=rider_data or (),
                expert=expert,
                head=head,
                rider_heads=rider_heads or (),
                release_head=release_head,
                recovered=recovered,
                kind=kind,
                trust_remote_code=trust_remote_code,
                threat_models=threat_models or (),
            )
            estimate, run = asked.estimate, asked.run
        if dry_run:
            expected = estimate(workers=workers, progress=progress)
            return Outcome(expected.to_json(), expected.lines())
        assert out is not None
        result = run(out=out, workers=workers, ray=ray, progress=progress)
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
