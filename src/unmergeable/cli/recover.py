"""``unmergeable recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import OutOption, SetOption, ThreadsOption
from unmergeable.settings import parse_assignments


def recover(
    context: typer.Context,
    protected: Annotated[Path, typer.Argument(metavar="PROTECTED", help="A protected checkpoint.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="The checkpoint it was fine-tuned from.")],
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="A recovery; `unmergeable methods` lists them.")
    ],
    out: OutOption,
    assignments: SetOption = None,
    threads: ThreadsOption = None,
) -> Outcome:
    """Undo a protection from the base alone, as an attacker would.

    Exact protections stop off-the-shelf merging; they do not stop somebody who holds the base model. This command shows
    it: merge what it writes to see how much of the protection is left.

    Example:
      unmergeable recover ./release --base ./Llama-3.1-8B --method nearest_orbit --out ./recovered
    """
    settings = parse_assignments(assignments or [])
    with working(context, can_resume=True) as progress:
        from unmergeable import api

        result = api.recover(
            protected, base=base, method=method, out=out, settings=settings, threads=threads, progress=progress
        )
    text = [
        f"Recovered: {result.out} ({result.method}; {result.cpu_seconds:.1f} CPU seconds for the estimate)",
        f"Relative distance of the attention weights to the base: {result.distance_before:.3g} before, "
        f"{result.distance_after:.3g} after",
        f"Confidence of the fit: {result.confidence:.2f} (0: what an unrelated base would give; 1: the base itself)",
        "It computes what the protected checkpoint computes, in the basis nearest to the base: try to merge it.",
    ]
    return Outcome(result.to_json(), text)
