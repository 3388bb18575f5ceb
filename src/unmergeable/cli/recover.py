"""``unmergeable recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import AllowPickleOption, OutOption, SetOption, ThreadsOption
from unmergeable.settings import parse_assignments


def recover(
    context: typer.Context,
    protected: Annotated[Path, typer.Argument(metavar="PROTECTED", help="The checkpoint to attack.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="The checkpoint it was fine-tuned from.")],
    method: Annotated[
        str,
        typer.Option("--method", metavar="NAME", help="An attack listed by `unmergeable methods`, or auto to choose."),
    ],
    out: OutOption,
    sources: Annotated[
        list[Path] | None,
        typer.Option("--source", metavar="PATH", help="Another checkpoint that the attack reads; repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="The attacker's examples, for attacks that need data.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", metavar="FILE", help="The task's head, where the network has none.")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            "--encoder",
            metavar="PATH",
            help="The checkpoint whose tokenizer or image processor prepares the examples; default BASE.",
        ),
    ] = None,
    assignments: SetOption = None,
    allow_pickle: AllowPickleOption = False,
    threads: ThreadsOption = None,
) -> Outcome:
    """Attack a protection without its key, and write the result.

    Exact protections write the same function in another basis; they do not stop somebody who holds the base model. This
    command shows it: merge what it writes to see how much of the protection is left.

    What a method reads beside the base is what its attacker holds. With --source: public fine-tunes of the base
    (source_subtraction), the release inside a merge (unmask, grad_erase), or a model without the victim to compare with
    (few_shot; default BASE). With --data: examples (few_shot, layerwise_ridge, grad_erase; block_regression draws
    inputs without), or inputs to run the release on (distil, which never looks at its weights).

    Example:
      unmergeable recover ./release --base ./Llama-3.1-8B --method nearest_orbit --out ./recovered
      unmergeable recover ./release --base ./base --method few_shot --data ./examples.jsonl --out ./trained
    """
    settings = parse_assignments(assignments or [])
    with working(context, can_resume=True) as progress:
        from unmergeable import ops

        result = ops.recover(
            protected,
            base=base,
            method=method,
            out=out,
            sources=sources or (),
            data=data,
            head=head,
            encoder=encoder,
            settings=settings,
            allow_pickle=allow_pickle,
            threads=threads,
            progress=progress,
        )
    return Outcome(result.to_json(), result.lines())
