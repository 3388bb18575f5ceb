"""What an audit and a table do before they compute: their folder, hashes of what they read, the machine they run on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unmergeable.errors import BadInput
from unmergeable.evaluation.cells import digest_of
from unmergeable.evaluation.plan import ExpertEntry
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.progress import Progress


def require_fine_tunes(base: Path, experts: Sequence[ExpertEntry]) -> None:
    """Every expert must be a fine-tune of the base. Raises Mismatch naming the tensor that tells."""
    for expert in experts:
        source, architecture = open_with_architecture(expert.path, base=base)
        open_base(base, source, architecture)


def prepared(out: Path, kind: str) -> Path:
    """The folder of an audit or a table (``kind``), new or that of an earlier one. Raises BadInput for any other."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; name a folder for the {kind}.")
    if out.is_dir() and any(out.iterdir()) and not (out / "cells").is_dir():
        raise BadInput(f"{out} is not empty and not the folder of an earlier {kind}; name another.")
    for name in ("cells", "models"):
        try:
            (out / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{out} cannot be created ({error.strerror}); name another folder.") from None
    return out


def hashed(paths: Sequence[Path], progress: Progress) -> dict[Path, str]:
    """The hash of every path."""
    digests = {}
    for number, path in enumerate(paths, start=1):
        digests[path] = digest_of(path)
        progress("hashing inputs", number, len(paths), "files")
    return digests


def environment() -> dict[str, Any]:
    """What a result depends on besides its inputs."""
    return {
        "unmergeable": version("unmergeable"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
    }
