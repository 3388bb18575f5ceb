"""``unmergeable protect``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import OutOption, PassphraseSwitch, SetOption, ThreadsOption
from unmergeable.cli.passphrase import read_passphrase
from unmergeable.cli.protect_polynomials import describe as describe_polynomials
from unmergeable.cli.protect_polynomials import is_polynomial
from unmergeable.cli.recipe import read_recipe
from unmergeable.errors import UsageError
from unmergeable.settings import parse_assignments

if TYPE_CHECKING:
    from unmergeable.api.protection import ProtectResult

DEFAULT_METHOD = "mergelock"


def protect(
    context: typer.Context,
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="Your fine-tune: a checkpoint or LoRA folder.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="The checkpoint it was fine-tuned from.")],
    out: OutOption,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME[,NAME]", help=f"Protections, applied left to right.  [default: {DEFAULT_METHOD}]"
        ),
    ] = None,
    assignments: SetOption = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="Examples of its use, for taylor_mlp and mergebarrier."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Methods and settings from a JSON or YAML file.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="Key file to create, outside OUT.  [default: OUT.key]")
    ] = None,
    passphrase: PassphraseSwitch = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", help="For experiments only: draw the key from N. Anybody can draw it again."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a checkpoint that has no safetensors files.")
    ] = False,
    threads: ThreadsOption = None,
) -> Outcome:
    """Write a copy that works alone but does not merge, and its key.

    The copy computes what EXPERT computes, up to rounding, and this is checked before OUT appears. The key gives the
    original back (see `unmergeable restore`).

    Exact protections stop off-the-shelf merging; they do not stop somebody who holds the base model (see `unmergeable
    recover`).

    Example:
      unmergeable protect ./my-llama-8b-medical --base ./Llama-3.1-8B --out ./release
    """
    methods, settings = _requested(method, assignments, recipe)
    key_options = {"--key": key, "--passphrase": passphrase, "--seed": seed is not None, "--dry-run": dry_run}
    if is_polynomial(methods, data, key_options | {"--allow-pickle": allow_pickle}):
        with working(context) as progress:
            from unmergeable.api.polynomials import protect_with_polynomials

            written = protect_with_polynomials(
                expert,
                base=base,
                out=out,
                method=methods[0],
                data=data,
                settings=settings,
                threads=threads,
                progress=progress,
            )
        return Outcome(written.to_json(), describe_polynomials(written, base))
    secret = read_passphrase(is_asked_for=passphrase, is_new=True)
    with working(context, can_resume=not dry_run) as progress:
        from unmergeable import api

        result = api.protect(
            expert,
            base=base,
            method=methods,
            out=out,
            key=key,
            settings=settings,
            seed=seed,
            passphrase=secret,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            threads=threads,
            progress=progress,
        )
    return Outcome(result.to_json(), describe(result, base))


def _requested(
    method: str | None, assignments: list[str] | None, recipe: Path | None
) -> tuple[Sequence[str], Mapping[str, object]]:
    if recipe is None:
        return (method or DEFAULT_METHOD).split(","), parse_assignments(assignments or [])
    if method is not None or assignments:
        raise UsageError("--recipe already says which methods and settings; give it without --method and --set.")
    return read_recipe(recipe)


_ROLES = {
    "query_key": "query and key",
    "value_output": "value and output",
    "heads": "order of heads",
    "feed_forward": "feed-forward",
    "experts": "order of experts",
    "norm": "gains of norms",
    "residual": "residual stream",
}


def describe(result: ProtectResult, base: Path) -> list[str]:
    """What the owner has to know after (or, in a dry run, before) protecting."""
    steps = ", ".join(str(step["method"]) for step in result.protections)
    changed = f"{result.changed_tensors} of {result.tensors} tensors"
    verb = "Would protect" if result.is_dry_run else "Protected"
    lines = [f"{verb}: {result.out} ({steps}; {changed}; {result.architecture})"]
    lines += [f"  {_ROLES.get(role, role)}: {group}" for role, group in result.groups.items()]
    if result.is_dry_run:
        lines += [f"Key: {result.key}, not made yet"]
        lines += [f"Largest error that rounding may cause in a block: {result.predicted_error:.1e} relative"]
        lines += _left_out(result)
        return [*lines, *result.notes, "Dry run: nothing was written."]
    lines += [
        f"Key: {result.key} (fingerprint {result.fingerprint[:8]})",
        "  Keep this file, with a backup, and never upload it: it gives the original back to whoever holds it.",
    ]
    assert result.measured_error is not None, "measured whenever something was written"
    lines += [f"Largest error of a block: {result.measured_error:.1e} relative; bound {result.predicted_error:.1e}"]
    if result.logits is not None:
        gap = result.logits
        measured = (
            f"not measured: {gap.reason}" if gap.gap is None else f"{gap.gap:.1e} relative; bound {gap.bound:.1e}"
        )
        lines += [f"Error of the network's output: {measured}"]
    lines += _left_out(result)
    recovered = result.out.with_name(result.out.name + "-recovered")
    command = ["unmergeable", "recover", str(result.out), "--base", str(base), "--method", "nearest_orbit"]
    return [*lines, *result.notes, f"See for yourself: {shlex.join([*command, '--out', str(recovered)])}"]


def _left_out(result: ProtectResult) -> list[str]:
    return [f"Left out: {name} ({reason})" for name, reason in result.left_out]
