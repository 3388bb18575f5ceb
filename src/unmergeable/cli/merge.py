"""``unmergeable merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import OutOption, SetOption, ThreadsOption
from unmergeable.settings import parse_assignments


def merge(
    context: typer.Context,
    out: OutOption,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="A mergekit configuration, instead of the options that follow."),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option("--expert", metavar="PATH[=COEFFICIENT]", help="A checkpoint to merge; repeat it for each."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="A merge; `unmergeable methods` lists them.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="BASE", help="What they were fine-tuned from; `linear` and `slerp` do without."),
    ] = None,
    assignments: SetOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Examples for methods that need data, from local files; repeat it for each --expert, in their order.",
        ),
    ] = None,
    backend: Annotated[
        Literal["own", "mergekit"],
        typer.Option(
            "--backend", help="`mergekit` runs the installed mergekit, and refuses a merge that lost tensors."
        ),
    ] = "own",
    checksums: Annotated[
        bool,
        typer.Option(
            "--checksums", help="Record the SHA-256 of every file read and written, not only of headers; takes longer."
        ),
    ] = False,
    threads: ThreadsOption = None,
) -> Outcome:
    """Merge fine-tunes of one base, as somebody might who found yours.

    Example:
      unmergeable merge --base ./base --expert ./yours=0.3 --expert ./theirs=0.3 --method task_arithmetic --out ./merged
    """
    if config is None and not (experts and method):
        raise typer.BadParameter("give --expert and --method, or a configuration file.", ctx=context)
    weighted = [parse_expert(expert) for expert in experts or []]
    settings = parse_assignments(assignments or [])
    with working(context, can_resume=backend == "own") as progress:
        from unmergeable import ops

        result = ops.merge(
            base=base,
            experts=weighted,
            method=method,
            out=out,
            settings=settings,
            data=data or [],
            config=config,
            backend=backend,
            checksums=checksums,
            threads=threads,
            progress=progress,
        )
    return Outcome(result.to_json(), result.lines())


def parse_expert(text: str) -> tuple[Path, float | None]:
    """``PATH=COEFFICIENT`` or ``PATH``. A path may hold ``=``: only a number after the last one is a coefficient."""
    path, separator, number = text.rpartition("=")
    try:
        return (Path(path), float(number)) if separator and path else (Path(text), None)
    except ValueError:
        return Path(text), None
