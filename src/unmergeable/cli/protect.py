"""``unmergeable protect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import AllowPickleOption, OutOption, PassphraseSwitch, RayOption, SetOption, ThreadsOption
from unmergeable.cli.passphrase import read_passphrase
from unmergeable.cli.recipe import read_recipe
from unmergeable.defaults import DEFAULT_METHOD, RELEASE_SETTINGS
from unmergeable.errors import UsageError
from unmergeable.settings import parse_assignments

_DEFAULT = " ".join([DEFAULT_METHOD, *(f"{name}={value}" for name, value in RELEASE_SETTINGS[DEFAULT_METHOD].items())])


def protect(
    context: typer.Context,
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="Your fine-tune: a checkpoint or LoRA folder.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE", help="The checkpoint it was fine-tuned from.")],
    out: OutOption,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME[,NAME]", help=f"Protections, applied left to right.  [default: {_DEFAULT}]"
        ),
    ] = None,
    assignments: SetOption = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="Examples of its use, for methods that need data.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", metavar="FILE", help="Head of its task, where EXPERT ends in features.")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            "--encoder",
            metavar="FOLDER",
            help="Whose tokenizer or image processor prepares the data.  [default: EXPERT]",
        ),
    ] = None,
    siblings: Annotated[
        list[Path] | None,
        typer.Option(
            "--sibling", metavar="PATH", help="Another fine-tune of BASE, for sensitivity_shield; repeat it for more."
        ),
    ] = None,
    generic: Annotated[
        Path | None,
        typer.Option("--generic", metavar="PATH", help="Inputs of other kinds than the task's, for collapse."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="NAME", help="Change one part alone: language, vision, …  [default: all]"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Methods and settings from a JSON or YAML file.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="FILE", help="Key file to create.  [default: in your folder of keys]"),
    ] = None,
    passphrase: PassphraseSwitch = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="Of training. Draws the key too: anybody can draw it again, so for experiments only.",
        ),
    ] = None,
    keep_adapter: Annotated[
        bool,
        typer.Option(
            "--keep-adapter",
            help="Write an adapter again: in another basis, which stops no merge, or trained by collapse or trap2.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    allow_pickle: AllowPickleOption = False,
    threads: ThreadsOption = None,
    ray: RayOption = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, metavar="N", help="Processes on it; one per processor by default.")
    ] = None,
) -> Outcome:
    """Write a copy that works alone but does not merge, and its key.

    With an exact method the copy computes what EXPERT computes, up to rounding, and this is checked before OUT appears.
    The key gives the original back (see `unmergeable restore`). The others have no key and change the function.

    No exact protection stops somebody who holds the base model (see `unmergeable recover`).

    Example:
      unmergeable protect ./my-llama-8b-medical --base ./Llama-3.1-8B --out ./release
    """
    methods, settings = _requested(method, assignments, recipe)
    makes_key = not keep_adapter and _makes_key(methods, settings)
    for option, given in {"--key": key, "--passphrase": passphrase}.items():
        if given and not makes_key:
            method_names = "--keep-adapter" if keep_adapter else ",".join(methods or ())
            raise UsageError(f"{method_names} makes no key: leave out {option}.")
    secret = read_passphrase(is_asked_for=passphrase, is_new=True) if makes_key else None
    with working(context, can_resume=not dry_run) as progress:
        from unmergeable import ops

        result = ops.protect(
            expert,
            base=base,
            method=methods,
            out=out,
            key=key,
            settings=settings,
            part=part,
            seed=seed,
            passphrase=secret,
            data=data,
            head=head,
            encoder=encoder,
            siblings=siblings or [],
            generic=generic,
            keep_adapter=keep_adapter,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            threads=threads,
            ray=ray,
            workers=workers,
            progress=progress,
        )
    return Outcome(result.to_json(), result.lines())


def _makes_key(methods: Sequence[str] | None, settings: Mapping[str, object]) -> bool:
    from unmergeable.ops.steps import steps_of

    return any(step.has_key for step in steps_of(methods, settings))


def _requested(
    method: str | None, assignments: list[str] | None, recipe: Path | None
) -> tuple[Sequence[str] | None, Mapping[str, object]]:
    """Methods, None for the default, and settings."""
    if recipe is None:
        return None if method is None else method.split(","), parse_assignments(assignments or [])
    if method is not None or assignments:
        raise UsageError("--recipe already says which methods and settings; give it without --method and --set.")
    return read_recipe(recipe)
