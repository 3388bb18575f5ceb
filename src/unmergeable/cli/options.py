"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OutOption = Annotated[Path, typer.Option("--out", metavar="OUT", help="Output directory; it must not exist yet.")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="The key file made with it.  [default: looked for where keys are]"),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method; may be repeated.")
]
AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read checkpoints that have no safetensors files.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Tensors to process at a time; default: one per processor."),
]
PlanOutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Output directory; rerun with the same one to resume.")
]
RootOption = Annotated[
    Path | None,
    typer.Option("--root", metavar="DIR", help="Where relative paths of the plan start; its folder by default."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, metavar="N", help="Processes; one per GPU, or per processor, by default."),
]
RayOption = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster; local starts one on this machine.")
]
PassphraseSwitch = Annotated[
    bool,
    typer.Option(
        "--passphrase",
        help="Prompt for the passphrase of the key file. In scripts, set UNMERGEABLE_PASSPHRASE instead.",
    ),
]
