"""``unmergeable protect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from unmergeable.cli.command import Outcome, working
from unmergeable.cli.options import OutOption, PassphraseSwitch, SetOption, ThreadsOption
from unmergeable.cli.passphrase import read_passphrase
from unmergeable.cli.protect_results import describe
from unmergeable.cli.recipe import read_recipe
from unmergeable.errors import UsageError
from unmergeable.settings import parse_assignments

DEFAULT_METHOD = "mergelock"

# Named here and not looked up: the registries lie behind an import of torch.
KEYLESS_METHODS = ("taylor_mlp", "mergebarrier", "mergeguard", "sensitivity_shield")


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
            "--seed",
            metavar="N",
            help="Of training. Draws the key too: anybody can draw it again, so for experiments only.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a checkpoint that has no safetensors files.")
    ] = False,
    threads: ThreadsOption = None,
) -> Outcome:
    """Write a copy that works alone but does not merge, and its key.

    With an exact method the copy computes what EXPERT computes, up to rounding, and this is checked before OUT appears.
    The key gives the original back (see `unmergeable restore`). The others have no key and change the function.

    Exact protections stop off-the-shelf merging; they do not stop somebody who holds the base model (see `unmergeable
    recover`).

    Example:
      unmergeable protect ./my-llama-8b-medical --base ./Llama-3.1-8B --out ./release
    """
    methods, settings = _requested(method, assignments, recipe)
    _require_key_use(methods, {"--key": key, "--passphrase": passphrase})
    secret = read_passphrase(is_asked_for=passphrase, is_new=True)
    with working(context, can_resume=not dry_run) as progress:
        from unmergeable import ops

        result = ops.protect(
            expert,
            base=base,
            method=methods,
            out=out,
            key=key,
            settings=settings,
            seed=seed,
            passphrase=secret,
            data=data,
            head=head,
            encoder=encoder,
            siblings=siblings or [],
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            threads=threads,
            progress=progress,
        )
    return Outcome(result.to_json(), describe(result, base))


def _require_key_use(methods: Sequence[str], options: Mapping[str, object]) -> None:
    """Refuse what is about a key where none is made."""
    for option, given in options.items():
        if given and all(name.strip() in KEYLESS_METHODS for name in methods):
            raise UsageError(f"{','.join(methods)} makes no key: leave out {option}.")


def _requested(
    method: str | None, assignments: list[str] | None, recipe: Path | None
) -> tuple[Sequence[str], Mapping[str, object]]:
    if recipe is None:
        return (method or DEFAULT_METHOD).split(","), parse_assignments(assignments or [])
    if method is not None or assignments:
        raise UsageError("--recipe already says which methods and settings; give it without --method and --set.")
    return read_recipe(recipe)
