"""``unmergeable inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.quantity import BYTES, COUNT, describe_quantity

if TYPE_CHECKING:
    from unmergeable.api.inspection import BaseComparison, InspectResult


def inspect(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a LoRA folder with --base.")
    ],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="Compare the weights with this checkpoint.")
    ] = None,
) -> Outcome:
    """Say what a checkpoint is and whether it looks protected.

    Also which changes of basis it allows and how much it suffers from rounding. With --base, whether it is a fine-tune
    of it, and how far each block is from it.

    Example:
      unmergeable inspect ./release --base ./Llama-3.1-8B
    """
    with working(context) as progress:
        from unmergeable import api

        result = api.inspect(checkpoint, base=base, progress=progress)
    return Outcome(result.to_json(), describe(result))


def describe(result: InspectResult) -> list[str]:
    """The facts, then the verdict."""
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in result.dtypes.items())
    shards = f"{result.shards} shard{'s' if result.shards != 1 else ''}"
    parameters = describe_quantity(result.parameters, COUNT)
    size = f"{parameters} parameters, {describe_quantity(result.nbytes, BYTES)} in {shards}"
    lines = [f"{result.checkpoint}: {result.model_type}, {size}", f"Tensors: {result.tensors} ({dtypes})"]
    lines += ["Changes of basis that keep the function:"]
    lines += [f"  {role.replace('_', ' and ')}: {group}" for role, group in result.groups.items()]
    if result.errors:
        lines += ["Relative error of attention weights when stored as:"]
        lines += ["  " + ", ".join(f"{kind} {error:.1e}" for kind, error in result.errors.items())]
    lines += _comparison(result.comparison) if result.comparison else []
    lines += [f"A protected copy would leave out: {name} ({reason})" for name, reason in result.left_out]
    return [*lines, f"Verdict: {result.verdict}"]


def _comparison(comparison: BaseComparison) -> list[str]:
    """Raw distances depend on the basis; those after the best change of basis do not."""
    width = max((len(fit.before.block) for fit in comparison.fits), default=0)
    parts = max((len(fit.before.part) for fit in comparison.fits), default=0)
    lines = [
        f"Relative distance to {comparison.folder}, as stored and after the best change of basis:",
        f"  {'all attention':<{width + parts + 2}}  {comparison.raw:8.4f}  {comparison.canonical:8.4f}",
    ]
    for fit in comparison.fits:
        name = f"{fit.before.block:<{width}}  {fit.before.part:<{parts}}"
        lines += [f"  {name}  {fit.before.relative:8.4f}  {fit.after.relative:8.4f}"]
    return lines
