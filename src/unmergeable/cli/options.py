"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OutOption = Annotated[Path, typer.Option("--out", metavar="OUT", help="Folder to create; it must not exist.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method; repeat it for more.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Tensors worked on at a time; one per processor if not given."),
]
PassphraseSwitch = Annotated[
    bool,
    typer.Option(
        "--passphrase",
        help="Ask for the passphrase that encrypts the key file. Scripts set UNMERGEABLE_PASSPHRASE instead.",
    ),
]
