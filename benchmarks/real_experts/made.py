"""What a study makes once: a folder, and beside it what making it cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from time import process_time
from typing import Any


def made(folder: Path, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Make the folder unless it is there; returns its facts, ``cpu_seconds`` among them.

    Args:
        folder: what to make. It appears when it is whole.
        make: fills the folder it is given, and says what is worth keeping about it, ready for JSON.
    """
    facts = folder.with_name(f"{folder.name}.json")
    if not (folder.exists() and facts.exists()):
        partial = folder.with_name(f".{folder.name}")
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        began = process_time()
        found = make(partial)
        facts.write_text(json.dumps({"cpu_seconds": round(process_time() - began, 1), **found}, indent=1) + "\n")
        partial.rename(folder)
    kept: dict[str, Any] = json.loads(facts.read_text())
    return kept
