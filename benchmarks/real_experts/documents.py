"""A table on disk: JSON with every figure, and Markdown beside it to read."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from unmergeable.checkpoint.disk import replace_file


def write(studies: Mapping[str, Any], out: Path | None, markdown: Callable[[str, Any], list[str]]) -> None:
    """Write the table to ``out`` and the Markdown beside it, or print the Markdown.

    Studies that are in ``out`` and not among ``studies`` stay as they are.
    """
    document: dict[str, Any] = {"machine": machine(), "studies": {}}
    if out is not None and out.exists():
        document["studies"] = json.loads(out.read_text())["studies"]
    document["studies"] |= studies
    text = "\n".join(line for name, study in document["studies"].items() for line in markdown(name, study)) + "\n"
    if out is None:
        print(text)
        return
    replace_file(out, (json.dumps(document, indent=1) + "\n").encode())
    replace_file(out.with_suffix(".md"), text.encode())


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    return {"processors": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
