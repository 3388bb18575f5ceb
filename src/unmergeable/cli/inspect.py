"""``unmergeable inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.quantity import BYTES, COUNT, describe_quantity

if TYPE_CHECKING:
    from unmergeable.ops.inspection import BaseComparison, Half, InspectResult


def inspect(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a LoRA folder with --base.")
    ],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="Compare the weights with this checkpoint.")
    ] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Option(
            "--source", metavar="PATH", help="A public fine-tune of BASE that may be mixed in; repeat it for more."
        ),
    ] = None,
) -> Outcome:
    """Say what a checkpoint is and whether it looks protected.

    Also which changes of basis it allows and how much it suffers from rounding. With --base, whether it is a fine-tune
    of it, how far each block is from it, and which protection the weights show signs of.

    Example:
      unmergeable inspect ./release --base ./Llama-3.1-8B
    """
    with working(context) as progress:
        from unmergeable import ops

        result = ops.inspect(checkpoint, base=base, sources=sources or (), progress=progress)
    return Outcome(result.to_json(), describe(result))


def describe(result: InspectResult) -> list[str]:
    """The facts, then the verdict."""
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in result.dtypes.items())
    shards = f"{result.shards} shard{'s' if result.shards != 1 else ''}"
    parameters = describe_quantity(result.parameters, COUNT)
    size = f"{parameters} parameters, {describe_quantity(result.nbytes, BYTES)} in {shards}"
    lines = [f"{result.checkpoint}: {result.model_type}, {size}", f"Tensors: {result.tensors} ({dtypes})"]
    lines += ["Changes of basis that keep the function:"] if result.groups else []
    lines += [f"  {role.replace('_', ' and ')}: {group}" for role, group in result.groups.items()]
    if result.errors:
        lines += ["Relative error of attention weights when stored as:"]
        lines += ["  " + ", ".join(f"{kind} {error:.1e}" for kind, error in result.errors.items())]
    lines += _comparison(result.comparison) if result.comparison else []
    lines += [f"A protected copy would leave out: {name} ({reason})" for name, reason in result.left_out]
    return [*lines, f"Verdict: {result.verdict}"]


def _comparison(comparison: BaseComparison) -> list[str]:
    """Raw distances depend on the basis; those after the best change of basis do not."""
    signs = [f"Sign of {sign.name}: {sign.evidence}" for sign in comparison.signs]
    if not comparison.fits:
        return signs
    width = max(len(fit.before.block) for fit in comparison.fits)
    parts = max(len(fit.before.part) for fit in comparison.fits)
    lines = [f"Relative distance to {comparison.folder}, as stored and after the best change of basis:"]
    halves: tuple[tuple[str, Half], ...] = (("all attention", "attention"), ("all feed-forwards", "feed_forward"))
    for name, half in halves:
        raw, canonical = comparison.distance(half, "before"), comparison.distance(half, "after")
        if raw is not None:
            lines += [f"  {name:<{width + parts + 2}}  {raw:8.4f}  {canonical:8.4f}"]
    for fit in comparison.fits:
        name = f"{fit.before.block:<{width}}  {fit.before.part:<{parts}}"
        lines += [f"  {name}  {fit.before.relative:8.4f}  {fit.after.relative:8.4f}"]
    return lines + signs
