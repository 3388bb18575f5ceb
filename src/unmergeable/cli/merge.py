"""``unmergeable merge``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import AllowPickleOption, OutOption, SetOption, ThreadsOption
from unmergeable.settings import parse_assignments


def merge(
    context: typer.Context,
    out: OutOption,
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG.yaml]",
            help="A mergekit configuration file, instead of --expert, --method, --base, --set and --data.",
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            metavar="PATH[=COEFFICIENT]",
            help="A checkpoint to merge, with its coefficient; repeat the option for each one.",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="A merge; `unmergeable methods` lists them.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", metavar="BASE", help="The checkpoint they were fine-tuned from; `linear` and `slerp` need none."
        ),
    ] = None,
    assignments: SetOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Examples, for methods that learn from data: a local file or folder per --expert, in the same order.",
        ),
    ] = None,
    backend: Annotated[
        Literal["own", "mergekit"],
        typer.Option(
            "--backend", help="`mergekit` runs the installed mergekit and rejects its result if tensors are missing."
        ),
    ] = "own",
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Merge LoRA adapters into an adapter, without their base.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="How weights are stored, e.g. bfloat16; by default as the base's are."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="base|N",
            help="Whose configuration, files, heads and towers the merge has: the base's or those of the Nth --expert.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="base|union|N",
            help="Whose tokens the merge has: the base's, those of all models, or of the Nth --expert.",
        ),
    ] = None,
    allow_pickle: AllowPickleOption = False,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Record hashes of whole files, not only of their headers; slower.")
    ] = False,
    threads: ThreadsOption = None,
) -> Outcome:
    """Merge fine-tunes of one base model, as anyone could with yours.

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
            keep_adapter=keep_adapter,
            dtype=dtype,
            template=parse_choice("--template", template, ("base",)),
            tokenizer=parse_choice("--tokenizer", tokenizer, ("base", "union")),
            allow_pickle=allow_pickle,
            checksums=checksums,
            threads=threads,
            progress=progress,
        )
    return Outcome(result.to_json(), result.lines())


def parse_expert(text: str) -> tuple[Path, float | None]:
    """``PATH=COEFFICIENT`` or ``PATH``.

    A path may hold ``=``: only a number after the last one is a coefficient, and none where the whole is a folder.

    Raises:
        typer.BadParameter: the part before the last ``=`` is a folder, and what follows no number.
    """
    path, separator, number = text.rpartition("=")
    if not separator or not path or (Path(text).exists() and not Path(path).exists()):
        return Path(text), None
    try:
        return Path(path), float(number)
    except ValueError:
        if Path(path).exists() and not Path(text).exists():
            raise typer.BadParameter(f"--expert {text}: {number!r} is no number; write {path}=0.5.") from None
        return Path(text), None


def parse_choice(option: str, text: str | None, names: Sequence[str]) -> str | int | None:
    """One of some names, or the number of an ``--expert``."""
    if text is None or text in names:
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"{option} {text}: give {', '.join(names)} or the number of an --expert, from 1.")
    return int(text)
