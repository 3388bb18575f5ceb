"""``unmergeable card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working


def card(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `protect` wrote.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="BASE",
            help="OWNER/NAME of the base; hub:OWNER/NAME or a folder to read its licence too.  [default: the card's]",
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option("--audit", metavar="PATH", help="Output directory or audit.json of an audit of this release."),
    ] = None,
    protection: Annotated[
        str | None, typer.Option("--protection", metavar="NAME", help="Which one of the audit, if it has several.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="OWNER/NAME", help="Where the release will be on the hub.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write it into OUT/README.md, in place of an earlier one.")
    ] = False,
) -> Outcome:
    """Say in a model card how a release is protected.

    Prints a section with method, settings, verdicts of audits, what it does not stop, the base and its licence, how to
    load it, how the holder of the key gets the original back. --write keeps the rest of the card as it is.

    Example:
      unmergeable card ./release --base meta-llama/Llama-3.1-8B --audit ./audit --write
    """
    with working(context):
        from unmergeable import evaluation

        made = evaluation.release_card(out, base=base, audit=audit, protection=protection, repo=repo, write=write)
    return Outcome(made.to_json(), made.lines())
