"""``unmergeable inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import AllowPickleOption
from unmergeable.cli.quantity import BYTES, COUNT, describe_quantity

if TYPE_CHECKING:
    from unmergeable.ops.inspection import InspectResult


def inspect(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a LoRA folder with --base.")
    ],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="The checkpoint it may have been fine-tuned from.")
    ] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Option("--source", metavar="PATH", help="A public fine-tune of BASE that may be mixed in; repeatable."),
    ] = None,
    allow_pickle: AllowPickleOption = False,
) -> Outcome:
    """Describe a checkpoint and say whether it looks protected.

    Lists the changes of basis that its architecture allows and the error of storing it in fewer bits. With --base:
    whether it is a fine-tune of that base, the distance of each block, and signs of a protection in the weights.

    Example:
      unmergeable inspect ./release --base ./Llama-3.1-8B
    """
    with working(context) as progress:
        from unmergeable import ops

        result = ops.inspect(checkpoint, base=base, sources=sources or (), allow_pickle=allow_pickle, progress=progress)
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
    lines += result.comparison.lines() if result.comparison else []
    lines += [f"Note: {note}" for note in result.notes]
    lines += [f"A protected copy would leave out: {name} ({reason})" for name, reason in result.left_out]
    return [*lines, f"Verdict: {result.verdict}"]
