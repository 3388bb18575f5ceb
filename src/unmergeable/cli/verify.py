"""``unmergeable verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import ThreadsOption
from unmergeable.errors import NotEquivalent

if TYPE_CHECKING:
    pass


def verify(
    context: typer.Context,
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="A checkpoint, or a LoRA folder with --base.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The checkpoint to compare it with.")],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="BASE", help="The base of EXPERT, where EXPERT is a LoRA folder.")
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(
            "--probe",
            metavar="FILE",
            help='Inputs: lines of {"text": ...} or {"input_ids": [...]}, or an .npz; random ones if not given.',
        ),
    ] = None,
    threads: ThreadsOption = None,
) -> Outcome:
    """Say whether two checkpoints compute the same, up to rounding.

    Every block is compared on random activations, and the outputs of the whole networks where they fit in memory. Exit
    code 4 says that they differ by more than rounding explains.

    Example:
      unmergeable verify ./my-llama-8b-medical ./release
    """
    with working(context) as progress:
        from unmergeable import ops

        result = ops.verify(expert, other, base=base, probe=probe, threads=threads, progress=progress)
    exit_code = 0 if result.is_equal else NotEquivalent.exit_code
    return Outcome(result.to_json(), result.lines(), exit_code)
