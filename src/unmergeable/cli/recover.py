"""``unmergeable recover``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import OutOption, SetOption, ThreadsOption
from unmergeable.settings import parse_assignments

if TYPE_CHECKING:
    from unmergeable.ops.recovery import RecoverResult


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
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="Examples for methods that need data, from local files."),
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", metavar="FILE", help="The task's head, for a network without its own.")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            "--encoder",
            metavar="PATH",
            help="Whose tokenizer or image processor prepares the examples; BASE's if not given.",
        ),
    ] = None,
    assignments: SetOption = None,
    threads: ThreadsOption = None,
) -> Outcome:
    """Undo a protection without its key, as an attacker would.

    Exact protections stop off-the-shelf merging; they do not stop somebody who holds the base model. This command shows
    it: merge what it writes to see how much of the protection is left.

    The method source_subtraction also reads public fine-tunes of the base, each given with --source. few_shot trains on
    --data, and does the same without the victim: from --source, or from the base.

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
            threads=threads,
            progress=progress,
        )
    return Outcome(result.to_json(), describe(result))


def describe(result: RecoverResult) -> list[str]:
    """What was found, and what the result is."""
    lines = [f"Recovered: {result.out} ({result.method}; {result.cpu_seconds:.1f} CPU seconds for the estimate)"]
    lines += [f"{name.replace('_', ' ').capitalize()}: {_value(value)}" for name, value in result.findings.items()]
    lines += [*describe_runs(result.learnt or {}), *describe_fits(result.learnt or {})]
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


def describe_runs(learnt: Mapping[str, Any]) -> list[str]:
    """What training did for the victim and for a start without it, where there was training."""
    lines = []
    for run, what in (("with_victim", "Trained"), ("without_victim", "The same without the victim")):
        if run in learnt:
            its = learnt[run]
            lines += [f"{what}, from {its['start']}: {describe_rate(its['learning_rate'])}{_held_out(its)}"]
    return lines


def describe_fits(learnt: Mapping[str, Any]) -> list[str]:
    """How near fitted projections come to the protected network's, where any were fitted."""
    if not learnt.get("fits"):
        return []
    before, after = (median(fit[side] for fit in learnt["fits"]) for side in ("before", "after"))
    lines = [
        f"Fitted {len(learnt['fits'])} projections: relative distance of what they put out {before:.3g} before, "
        f"{after:.3g} after (median)"
    ]
    return [*lines, *([f"Left as in the base: {', '.join(learnt['skipped'])}"] if learnt["skipped"] else [])]


def describe_rate(learning_rate: float) -> str:
    return f"learning rate {learning_rate:g}" if learning_rate else "left as it is, since no learning rate did better"


def _held_out(run: Mapping[str, Any]) -> str:
    """Accuracy on the examples left out, of the weights as they were and after training."""
    accuracies = {trial["learning_rate"]: trial["accuracy"] for trial in run["sweep"]}
    if not accuracies:
        return ""
    return f"; accuracy on examples left out {accuracies[0.0]:.3f} -> {accuracies[run['learning_rate']]:.3f}"


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
