"""``unmergeable merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import OutOption, SetOption, ThreadsOption
from unmergeable.settings import parse_assignments


def merge(
    context: typer.Context,
    experts: Annotated[
        list[str],
        typer.Option("--expert", metavar="PATH[=COEFFICIENT]", help="A checkpoint to merge; repeat it for each."),
    ],
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="A merge; `unmergeable methods` lists them.")],
    out: OutOption,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="BASE", help="What they were fine-tuned from; `linear` does without."),
    ] = None,
    assignments: SetOption = None,
    threads: ThreadsOption = None,
) -> Outcome:
    """Merge fine-tunes of one base, as somebody might who found yours.

    Example:
      unmergeable merge --base ./base --expert ./yours=0.3 --expert ./theirs=0.3 --method task_arithmetic --out ./merged
    """
    weighted = [parse_expert(expert) for expert in experts]
    settings = parse_assignments(assignments or [])
    with working(context, can_resume=True) as progress:
        from unmergeable import api

        result = api.merge(
            base=base, experts=weighted, method=method, out=out, settings=settings, threads=threads, progress=progress
        )
    text = [f"Merged: {result.out} ({result.method}; {result.tensors} tensors)"]
    text += [f"  {coefficient:g} of {path}" for path, coefficient in result.experts]
    return Outcome(result.to_json(), text)


def parse_expert(text: str) -> tuple[Path, float | None]:
    """``PATH=COEFFICIENT`` or ``PATH``. A path may hold ``=``: only a number after the last one is a coefficient."""
    path, separator, number = text.rpartition("=")
    try:
        return (Path(path), float(number)) if separator and path else (Path(text), None)
    except ValueError:
        return Path(text), None
