"""``unmergeable verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import ThreadsOption
from unmergeable.errors import NotEquivalent, UsageError

if TYPE_CHECKING:
    from unmergeable.ops.verification import VerifyResult


def verify(
    context: typer.Context,
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="A checkpoint, or a LoRA folder with --base.")],
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="The checkpoint to compare it with.")] = None,
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
    manifest: Annotated[
        bool, typer.Option("--manifest", help="Instead: are EXPERT's files what its unmergeable.json says, and signed?")
    ] = False,
    public_key: Annotated[
        str | None, typer.Option("--public-key", metavar="HEX", help="With --manifest: who must have signed it.")
    ] = None,
    threads: ThreadsOption = None,
) -> Outcome:
    """Say whether two checkpoints compute the same, up to rounding.

    Every block is compared on random activations, and the outputs of the whole networks where they fit in memory. Exit
    code 4 says that they differ by more than rounding explains; with --manifest, that files or signature are wrong.

    Example:
      unmergeable verify ./my-llama-8b-medical ./release
    """
    if manifest:
        if any(given is not None for given in (other, base, probe)):
            raise UsageError("--manifest looks at one folder: leave out OTHER, --base and --probe.")
        return _verify_manifest(context, expert, public_key)
    if public_key is not None:
        raise UsageError("--public-key is of use with --manifest only; add that.")
    if other is None:
        raise UsageError("give OTHER, the checkpoint to compare with, or --manifest. See: unmergeable verify --help")
    with working(context) as progress:
        from unmergeable import ops

        result = ops.verify(expert, other, base=base, probe=probe, threads=threads, progress=progress)
    exit_code = 0 if result.is_equal else NotEquivalent.exit_code
    return Outcome(result.to_json(), describe(result, expert, other), exit_code)


def _verify_manifest(context: typer.Context, release: Path, public_key: str | None) -> Outcome:
    with working(context):
        from unmergeable import ops

        result = ops.verify_manifest(release, public_key=public_key)
    return Outcome(result.to_json(), result.lines(), 0 if result.is_intact else NotEquivalent.exit_code)


def describe(result: VerifyResult, expert: Path, other: Path) -> list[str]:
    """The verdict, and the measurements it rests on."""
    if not result.is_equal:
        return [f"Not equal: {other} does not compute what {expert} computes: {result.explain()}."]
    blocks = result.equivalence.blocks
    lines = [f"Equal up to rounding: {expert} and {other} ({len(blocks)} blocks; {result.architecture})"]
    worst = result.equivalence.worst
    if worst is not None:
        lines += [f"Block nearest to its bound: {worst.name}, {worst.error:.1e} relative; bound {worst.bound:.1e}"]
    return [*lines, f"Difference of the networks' outputs: {result.logits.describe()}"]
