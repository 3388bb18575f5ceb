"""Whether a checkpoint has the structure of the base, from headers alone: without it there is nothing to merge."""

from __future__ import annotations

from pathlib import Path

from unmergeable.checkpoint.listing import list_folder
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import TensorSource, require_same_tensors
from unmergeable.errors import BadInput, Mismatch
from unmergeable.merges.models import require_same_architecture


def open_whole(path: Path, base: Path) -> TensorSource:
    """Open a checkpoint that stands for itself.

    Raises:
        BadInput: it is an adapter.
        CheckpointError: it cannot be read.
    """
    if list_folder(path).is_adapter:
        raise BadInput(
            f"{path} is an adapter, which an audit cannot load; write it out first: unmergeable merge --base {base} "
            f"--expert {path}=1 --expert {base}=0 --method task_arithmetic --out {path}-whole"
        )
    return open_checkpoint(path)


def require_base_structure(base: Path, path: Path) -> None:
    """Require the base's architecture, and its tensors in their shapes; their precision does not matter.

    Raises:
        Mismatch: naming what differs.
        BadInput, CheckpointError: one of them is an adapter, or cannot be read.
    """
    ours, theirs = open_checkpoint(base), open_whole(path, base)
    require_same_architecture(ours, theirs)
    require_same_tensors(theirs, ours, "to be merged, models must hold the same tensors")


def difference(base: Path, path: Path) -> str:
    """What differs from the base's structure; empty where nothing does. Raises CheckpointError."""
    try:
        require_base_structure(base, path)
    except Mismatch as error:
        return str(error)
    return ""
