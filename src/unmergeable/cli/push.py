"""``unmergeable push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working


def push(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `protect` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    create_pr: Annotated[
        bool, typer.Option("--create-pr/--no-create-pr", help="As a pull request, or straight into the branch.")
    ] = True,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Which branch.  [default: main]")
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Make REPO, public, where there is none.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make REPO, private, where there is none; refuse a public one.")
    ] = False,
    message: Annotated[
        str | None,
        typer.Option("--commit-message", "--message", metavar="TEXT", help="Of the commit and the pull request."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded and what not, and upload nothing.")
    ] = False,
) -> Outcome:
    """Upload a release, and nothing else, to the hub.

    What its manifest lists goes up, with card, licences and pictures, to a repository on the Hugging Face hub. Every
    file is compared with the manifest first. A folder with a key in it, one that is no release, and one that was
    changed since are refused. Log in with `hf auth login`, or set HF_TOKEN.

    Example:
      unmergeable push ./release me/my-llama-8b-medical --private --dry-run
    """
    with working(context, can_resume=not dry_run) as progress:
        from unmergeable import ops

        result = ops.push(
            out,
            repo,
            create_pr=create_pr,
            revision=revision,
            create=create,
            private=private,
            message=message,
            dry_run=dry_run,
            progress=progress,
        )
    return Outcome(result.to_json(), result.lines())
