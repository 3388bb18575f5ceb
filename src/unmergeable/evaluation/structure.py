"""Whether a checkpoint has the structure of the base, from headers alone: without it there is nothing to merge."""

from __future__ import annotations

from pathlib import Path

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import require_same_tensors
from unmergeable.errors import Mismatch
from unmergeable.merges.models import require_same_architecture


def require_base_structure(base: Path, path: Path) -> None:
    """Require the base's architecture, and its tensors in their shapes; their precision does not matter.

    Raises:
        Mismatch: naming what differs.
        CheckpointError: one of them cannot be read.
    """
    ours, theirs = open_checkpoint(base), open_checkpoint(path)
    require_same_architecture(ours, theirs)
    require_same_tensors(theirs, ours, "to be merged, models must hold the same tensors")


def difference(base: Path, path: Path) -> str:
    """What differs from the base's structure; empty where nothing does. Raises CheckpointError."""
    try:
        require_base_structure(base, path)
    except Mismatch as error:
        return str(error)
    return ""
