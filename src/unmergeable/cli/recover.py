"""``unmergeable recover``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import OutOption, SetOption, ThreadsOption
from unmergeable.settings import parse_assignments

if TYPE_CHECKING:
    from unmergeable.api.recovery import RecoverResult


def recover(
    context: typer.Context,
    protected: Annotated[Path, typer.Argument(metavar="PROTECTED", help="A protected checkpoint.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="The checkpoint it was fine-tuned from.")],
    method: Annotated[
        str,
        typer.Option("--method", metavar="NAME", help="A recovery; `unmergeable methods` lists them; auto chooses."),
    ],
    out: OutOption,
    sources: Annotated[
        list[Path] | None,
        typer.Option(
            "--source", metavar="PATH", help="A public fine-tune of BASE that may be mixed in; repeat it for more."
        ),
    ] = None,
    assignments: SetOption = None,
    threads: ThreadsOption = None,
) -> Outcome:
    """Undo a protection from the base alone, as an attacker would.

    Exact protections stop off-the-shelf merging; they do not stop somebody who holds the base model. This command shows
    it: merge what it writes to see how much of the protection is left.

    The method source_subtraction also reads public fine-tunes of the base, each given with --source.

    Example:
      unmergeable recover ./release --base ./Llama-3.1-8B --method nearest_orbit --out ./recovered
    """
    settings = parse_assignments(assignments or [])
    with working(context, can_resume=True) as progress:
        from unmergeable import api

        result = api.recover(
            protected,
            base=base,
            method=method,
            out=out,
            sources=sources or (),
            settings=settings,
            threads=threads,
            progress=progress,
        )
    return Outcome(result.to_json(), describe(result))


def describe(result: RecoverResult) -> list[str]:
    """What was found, and what the result is."""
    lines = [f"Recovered: {result.out} ({result.method}; {result.cpu_seconds:.1f} CPU seconds for the estimate)"]
    lines += [f"{name.replace('_', ' ').capitalize()}: {_value(value)}" for name, value in result.findings.items()]
    if result.distance_before is not None:
        lines += [
            f"Relative distance of the weights it fits to the base: {result.distance_before:.3g} before, "
            f"{result.distance_after:.3g} after",
            f"Confidence of the fit: {result.confidence:.2f} (0: what an unrelated base gives; 1: the base itself)",
        ]
    if result.is_exact:
        lines += [
            "It computes what the protected checkpoint computes, in the basis nearest to the base: try to merge it."
        ]
    else:
        lines += ["It does not compute what the protected checkpoint computes: measure it, then try to merge it."]
    return lines


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
